"""Records of snapshots against dictionaries: the rows of the contract's error table, and collections."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.metadata.lineage import Committing, MetaStore
from engine.snapshots import Commit, Kind, Usage
from tests.property.records_machine import BACKEND, RecordsMachine

_KEYS = ["s", "t", "u", "v", "w"]
KEYS = st.sampled_from(_KEYS)
KINDS = st.sampled_from([Kind.ACTIVE, Kind.ACTIVE, Kind.VIEW])
PATHS = st.none() | st.lists(st.sampled_from(["labels", "labels.k", "x"]), max_size=2)


class SnapshotMachine(RecordsMachine):
    """Lineages of one backend, some of them work in progress of a lease."""

    @property
    def store(self) -> MetaStore:
        return MetaStore(self.root.meta, BACKEND, "default")

    def kind(self, key: str) -> str:
        return self.model.snapshots[key][0] if key in self.model.snapshots else ""

    def some(self, data: Any, kind: str = "") -> str:
        """Draw a key, most often of a snapshot that is there, above all of one with others on it."""
        below = [parent for _, parent, _, _ in self.model.snapshots.values() if parent]
        there = [key for key in [*sorted(self.model.snapshots), *below] if kind in {"", self.kind(key)}]
        return data.draw(st.sampled_from([*there * 5, *_KEYS]))  # type: ignore[no-any-return]

    @rule()
    def lend(self) -> None:
        if "mine" in self.model.leases:
            self.stores.leases.delete("mine")
            del self.model.leases["mine"], self.model.members["mine"]
        else:
            self.stores.leases.create("mine", life=None)
            self.model.leases["mine"] = (True, {})
            self.model.members["mine"] = set()

    @rule(key=KEYS, kind=KINDS, stands=st.booleans(), data=st.data())
    def create(self, key: str, kind: Kind, stands: bool, data: Any) -> None:
        parent = self.some(data, "committed") if stands else ""
        labels, lease = self.labels(data), self.lease(data)
        expected: type[EngineError] | None = None
        if key in self.model.snapshots:
            expected = AlreadyExists
        elif parent and parent not in self.model.snapshots:
            expected = NotFound
        elif parent and self.kind(parent) != "committed":
            expected = InvalidArgument
        make = partial(self.store.create, key, kind, parent, labels, lease)
        if expected:
            self.fails(expected, make)
            return
        record, parents = make()
        assert (record.key, record.kind, record.parent, record.labels) == (key, kind, parent, labels)
        assert [one.key for one in parents] == self.below(parent)
        self.model.snapshots[key] = (str(kind), parent, lease, labels)
        self.join(lease, ("snapshots", BACKEND, key))

    def below(self, key: str) -> list[str]:
        found = []
        while key:
            found.append(key)
            key = self.model.snapshots[key][1]
        return found

    @rule(stands=st.booleans(), data=st.data())
    def add_layer(self, stands: bool, data: Any) -> None:
        """Make a committed snapshot: most of the time there should be some."""
        parent = self.some(data, "committed") if stands else ""
        name = next((key for key in _KEYS if key not in self.model.snapshots), "")
        if not name or (parent and self.kind(parent) != "committed"):
            return
        labels, lease = self.labels(data), self.lease(data)
        self.store.create("layer", Kind.ACTIVE, parent, {}, "")
        self.store.commit(
            Committing(Commit(name=name, key="layer", lease=lease, labels=labels), Usage(1, 1))
        )
        self.model.snapshots[name] = ("committed", parent, "", labels)
        self.join(lease, ("snapshots", BACKEND, name))

    def actives(self) -> list[str]:
        return [key for key in self.model.snapshots if self.kind(key) == "active"]

    @precondition(actives)
    @rule(name=KEYS, parent=st.sampled_from([None, "", "x"]), data=st.data())
    def commit(self, name: str, parent: str | None, data: Any) -> None:
        key = self.some(data, "active")
        parent = parent and self.some(data, "committed")
        labels, lease = self.labels(data), self.lease(data)
        expected = self.wrong_commit(key, name, parent)
        step = Commit(name=name, key=key, parent=parent, lease=lease, labels=labels)
        if expected:
            self.fails(expected, lambda: self.store.commit(Committing(step, Usage(1, 1))))
            return
        self.store.commit(Committing(step, Usage(1, 1)))
        event("committed")
        _, below, _, _ = self.model.snapshots.pop(key)
        self.model.snapshots[name] = ("committed", below or parent or "", "", labels)
        self.join(lease, ("snapshots", BACKEND, name))

    def wrong_commit(self, key: str, name: str, parent: str | None) -> type[EngineError] | None:
        kind, below, _, _ = self.model.snapshots.get(key, ("", "", "", {}))
        rebases = bool(not below and parent)
        rows = {
            NotFound: not kind,
            FailedPrecondition: kind != "active",
            AlreadyExists: name in self.model.snapshots,
            InvalidArgument: bool(below and parent and parent != below),
        }
        wrong = next((error for error, is_so in rows.items() if is_so), None)
        if wrong is None and rebases and self.kind(parent or "") != "committed":
            return FailedPrecondition if parent in self.model.snapshots else NotFound
        return wrong

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.snapshots)))
        self.store.release(key)
        kind, parent, _, labels = self.model.snapshots[key]
        self.model.snapshots[key] = (kind, parent, "", labels)

    @precondition(lambda self: self.model.snapshots)
    @rule(
        key=KEYS,
        data=st.data(),
        paths=st.none() | st.lists(st.sampled_from(["labels", "labels.k", "x"])),
    )
    def update(self, key: str, data: Any, paths: Sequence[str] | None) -> None:
        wanted = self.labels(data)
        expected: type[EngineError] | None = None
        if key not in self.model.snapshots:
            expected = NotFound
        elif paths and "x" in paths:
            expected = InvalidArgument
        if expected:
            self.fails(expected, lambda: self.store.update(key, wanted, paths))
            return
        record = self.store.update(key, wanted, paths)
        kind, parent, lease, labels = self.model.snapshots[key]
        if paths is None:
            labels = labels | wanted
        for path in ["labels"] if paths is not None and not paths else paths or []:
            if path == "labels":
                labels = dict(wanted)
            else:
                labels = {k: v for k, v in (labels | {"k": wanted.get("k", "")}).items() if v}
        assert record.labels == labels
        self.model.snapshots[key] = (kind, parent, lease, labels)

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        """GC-03: a parent outlives what stands on it."""
        key = self.some(data)
        expected: type[EngineError] | None = None if key in self.model.snapshots else NotFound
        if any(parent == key for _, parent, _, _ in self.model.snapshots.values()):
            expected = FailedPrecondition
        if expected:
            self.fails(expected, lambda: self.store.remove(key))
            return
        self.store.remove(key)
        del self.model.snapshots[key]

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data())
    def find(self, data: Any) -> None:
        """GC-11: what is found joins the lease in the step that finds it."""
        key = self.some(data)
        lease = self.lease(data)
        try:
            record = self.store.get(key, lease=lease)
        except NotFound:
            assert key not in self.model.snapshots
            return
        assert record.kind == self.kind(key)
        self.join(lease, ("snapshots", BACKEND, key))


TestSnapshots = SnapshotMachine.TestCase
TestSnapshots.settings = settings(
    settings.default, max_examples=2 * settings.default.max_examples, stateful_step_count=30
)
