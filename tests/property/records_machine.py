"""A plain model of a namespace's records, and the half of a state machine that all of them share.

The model is dictionaries that the rules change as the contract says; what a collection leaves is what
the naive closure says. After each step the records, whole, are held against it. Time moves only by a
rule; a process ends by opening the root again, where its leases and ingests have lost their owner.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.errors import EngineError
from engine.gc.collect import collect
from engine.gc.survey import Places
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.root import Root
from engine.stores import Stores
from engine.times import rfc3339
from tests.clocks import HOUR, HandClock, clock_by_hand
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST
from tests.filesystems import shared_memory
from tests.property.naive_closure import Name, Thing, closure, parents_missing, world_of

__all__ = [
    "BACKEND",
    "BLOBS",
    "EXPIRE",
    "FLAT",
    "HOUR",
    "REF",
    "Model",
    "RecordsMachine",
    "digest",
    "target",
]

BACKEND = "overlay"
EXPIRE, FLAT, ROOT, REF = (
    f"containerd.io/gc.{word}" for word in ("expire", "flat", "root", "ref.content.x")
)
_NAMES = "012"
BLOBS = st.sampled_from(_NAMES)


def digest(name: str) -> str:
    """Return the digest of the blob that is called so, whose bytes are its name."""
    return digest_of(name.encode())


def target(name: str) -> Descriptor:
    """Return what an image of that blob means."""
    return Descriptor(media_type=MANIFEST, digest=digest(name), size=len(name))


@dataclass
class Model:
    """What there is: labels of everything, and what else counts."""

    clock: HandClock
    blobs: dict[str, dict[str, str]] = field(default_factory=dict)
    images: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    leases: dict[str, tuple[bool, dict[str, str]]] = field(default_factory=dict)
    members: dict[str, set[Name]] = field(default_factory=dict)
    ingests: dict[str, tuple[int, bool, str]] = field(default_factory=dict)
    snapshots: dict[str, tuple[str, str, str, dict[str, str]]] = field(default_factory=dict)

    @property
    def at(self) -> int:
        return self.clock.at

    def world(self) -> dict[Name, Thing]:
        """Return it as the naive closure has it."""
        found: dict[Name, Thing] = {}
        for name, labels in self.blobs.items():
            found["content", "", name] = Thing(labels)
        for name, (held, labels) in self.images.items():
            found["images", "", name] = Thing(labels, ("content", "", held))
        for name, (alive, labels) in self.leases.items():
            members = tuple(sorted(self.members[name]))
            found["leases", "", name] = Thing(labels, None, alive, members)
        for ref, (expires, alive, expected) in self.ingests.items():
            below = ("content", "", expected) if expected else None
            found["ingests", "", ref] = Thing({}, below, alive or expires > self.at)
        for key, (kind, parent, lease, labels) in self.snapshots.items():
            below = ("snapshots", BACKEND, parent) if parent else None
            found["snapshots", BACKEND, key] = Thing(labels, below, kind != "committed" and not lease)
        return found

    def keep(self, names: set[Name]) -> None:
        """Forget all but these."""
        for kind, things in (
            ("content", self.blobs),
            ("images", self.images),
            ("leases", self.leases),
            ("ingests", self.ingests),
            ("snapshots", self.snapshots),
        ):
            kept = {name for found, _, name in names if found == kind}
            for name in things.keys() - kept:
                del things[name]  # type: ignore[attr-defined]
        self.members = {name: held for name, held in self.members.items() if name in self.leases}

    def is_live(self, lease: str) -> bool:
        """Say whether a lease is there and holds on."""
        return lease in self.leases and ("leases", "", lease) in closure(self.world(), self.at / 1e9)


class RecordsMachine(RuleBasedStateMachine):
    """Blobs, time, collections and processes that end; what else there is, others add."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.time = clock_by_hand()
        self.model = Model(self.time.__enter__())
        self.open()

    def open(self) -> None:
        self.root = Root(self.folder / "root")
        self.stores = Stores(self.root, "default", AMD64)

    def teardown(self) -> None:
        self.time.__exit__(None, None, None)
        self.root.close()
        self.memory.__exit__(None, None, None)

    def labels(self, data: Any) -> dict[str, str]:
        """Draw labels, of which some steer collections."""
        model = self.model
        values = {
            "k": st.sampled_from(["1", "2"]),
            ROOT: st.just("x"),
            REF: BLOBS.map(digest),
            EXPIRE: st.sampled_from([rfc3339(model.at), rfc3339(model.at + HOUR), "soon"]),
        }
        keys = data.draw(st.sets(st.sampled_from(sorted(values)), max_size=2))
        return {key: data.draw(values[key]) for key in sorted(keys)}

    def lease(self, data: Any) -> str:
        """Draw a lease that is there, more often than none."""
        return data.draw(st.sampled_from([*sorted(self.model.leases) * 3, ""]))  # type: ignore[no-any-return]

    def join(self, lease: str, name: Name) -> None:
        if lease:
            self.model.members[lease].add(name)

    @staticmethod
    def fails(expected: type[EngineError], call: Callable[[], object]) -> None:
        with pytest.raises(EngineError) as caught:
            call()
        assert type(caught.value) is expected

    @rule(data=st.data(), name=BLOBS)
    def put(self, data: Any, name: str) -> None:
        lease = self.lease(data)
        labels = self.labels(data)
        name = digest(name)
        if name in self.model.blobs:
            self.stores.content.info(name, lease=lease)
        else:
            with self.stores.content.ingest(f"put {name}", lease=lease) as writer:
                writer.write(next(one for one in _NAMES if digest(one) == name).encode())
                writer.commit(labels)
            self.model.blobs[name] = labels
        self.join(lease, ("content", "", name))

    @rule(hours=st.sampled_from([0.5, 1, 24]))
    def time_passes(self, hours: float) -> None:
        self.model.clock.at += int(hours * HOUR)

    @rule()
    def the_process_ends(self) -> None:
        self.root.close()
        mine = {name for name, about in self.model.leases.items() if name.startswith("work")}
        for name in mine:
            self.model.leases[name] = (False, self.model.leases[name][1])
        for ref, (expires, _, expected) in self.model.ingests.items():
            self.model.ingests[ref] = (expires, False, expected)
        self.open()

    @rule()
    def collect(self) -> None:
        """GC-02, GC-05, GC-06, P11: a collection leaves what is held, and nothing else."""
        world = self.model.world()
        kept = closure(world, self.model.at / 1e9)
        event(f"collected {'something' if len(kept) < len(world) else 'nothing'}")
        collect(self.root.meta, Places(namespace="default", backends=[BACKEND]))
        self.model.keep(kept)

    @invariant()
    def records_are_as_in_the_model(self) -> None:
        with self.root.meta.read() as txn:
            me = self.root.owners.me.id
            found = world_of(txn, "default", [BACKEND], me, self.model.at)
        # In the order of their keys, which begin with lengths.
        sorted_members = {
            n: replace(one, members=tuple(sorted(one.members))) for n, one in found.items()
        }
        assert sorted_members == self.model.world()
        assert not parents_missing(found)
