"""The write barrier of a collection, in all interleavings of small cases.

A collection of a few objects, one dropped in each transaction, and one or two operations of others at
every moment between two of its transactions: before the record of the mark, between that and the
snapshot that the mark reads, before each slice of the sweep, and after it. After each step the records
are held against a naive closure (`tests.property.naive_closure`).

In CI all of one operation, and of each 31st pair; with HYPOTHESIS_PROFILE=deep all pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement, count, islice, product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.content.writer import Writer
from engine.errors import EngineError
from engine.gc import collect as collecting
from engine.gc.collect import collect
from engine.gc.holding import give_up, remove_blob
from engine.gc.mark import by_level, holders_first, reachable
from engine.gc.survey import Places
from engine.kv.environment import Transaction
from engine.kv.schema import COUNTERS, INLINE, LEASES, Blob, Image, Ingest, Lease, Snapshot, now
from engine.metadata import ledger
from engine.metadata.lineage import Committing, MetaStore
from engine.metadata.nodes import Node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.processes import Owner
from engine.root import Root
from engine.snapshots import Commit, Kind, Usage
from engine.stores import Stores
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST
from tests.filesystems import shared_memory
from tests.meddling import meddled
from tests.property.naive_closure import (
    Name,
    World,
    broken_by,
    closure,
    grown,
    held_alone,
    parents_missing,
    world_of,
)

_PAST, _FUTURE = "2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z"
_EXPIRE, _FLAT, _ROOT = (f"containerd.io/gc.{word}" for word in ("expire", "flat", "root"))
_DEAD = Owner(id="dead", pid=1, namespace="1")
_STRIDE = 1 if settings.get_current_profile_name() == "deep" else 31
_SNAPSHOTS = "copy"
_COUNT = count()
_END = 1 << 30
_LONG = "long" * INLINE  # has extents, and an ingest while it comes
_writers: dict[str, Writer] = {}  # by namespace

Labels = dict[str, str]
Operation = Callable[[Stores], object]


def digest(name: str) -> str:
    """Return the digest of the blob that is called so, whose bytes are its name."""
    return digest_of(name.encode())


def ref(*names: str) -> Labels:
    return {f"containerd.io/gc.ref.content.{name}": digest(name) for name in names}


def bref(name: str) -> Labels:
    return {"containerd.io/gc.bref.content": digest(name)}


def snapshot_ref(key: str, how: str = "ref") -> Labels:
    return {f"containerd.io/gc.{how}.snapshot.{_SNAPSHOTS}": key}


def blob_node(name: str) -> Node:
    return Node("content", "", digest(name))


def snapshot_node(key: str) -> Node:
    return Node("snapshots", _SNAPSHOTS, key)


# -- worlds: what is there when a collection begins ---------------------------------------------


class Maker:
    """Makes objects within one transaction."""

    def __init__(self, txn: Transaction, namespace: str, me: Owner) -> None:
        self._txn = txn
        self._namespace = namespace
        self._me = me

    def blob(self, name: str, labels: Labels | None = None) -> None:
        number = COUNTERS.next(self._txn, "blob")
        record = Blob(
            digest=digest(name),
            number=number,
            size=len(name),
            created=1,
            updated=1,
            labels=labels or {},
        )
        ledger.put(self._txn, self._namespace, record)

    def snapshot(
        self,
        key: str,
        parent: str = "",
        labels: Labels | None = None,
        kind: Kind = Kind.COMMITTED,
        lease: str = "",
    ) -> None:
        number = COUNTERS.next(self._txn, "snapshot")
        record = Snapshot(
            key=key,
            id=number,
            kind=kind,
            parent=parent,
            created=1,
            updated=1,
            lease=lease,
            labels=labels or {},
        )
        ledger.put_snapshot(self._txn, _SNAPSHOTS, self._namespace, record)
        ledger.pin(self._txn, self._namespace, lease, snapshot_node(key), made=True)

    def image(self, name: str, target: str, labels: Labels | None = None) -> None:
        descriptor = Descriptor(media_type=MANIFEST, digest=digest(target), size=6)
        full = f"example.org/{name}:1"
        record = Image(name=full, target=descriptor, created=1, updated=1, labels=labels or {})
        ledger.put(self._txn, self._namespace, record)

    def lease(self, name: str, labels: Labels, *members: Node, dead: bool = False) -> None:
        record = Lease(id=name, created=1, labels=labels, owner=_DEAD if dead else None)
        ledger.put(self._txn, self._namespace, record)
        for member in members:
            ledger.pin(self._txn, self._namespace, name, member)

    def ingest(self, name: str, expected: str, *, dead: bool = True) -> None:
        record = Ingest(
            ref=name,
            number=COUNTERS.next(self._txn, "blob"),
            total=None,
            expected=digest(expected),
            owner=_DEAD if dead else self._me,
            lease="",
            started=1,
        )
        ledger.put(self._txn, self._namespace, record)


# -- operations: what others do meanwhile -------------------------------------------------------


def use(name: str, stores: Stores) -> None:
    stores.content.info(digest(name), lease="mine")


def put(name: str, stores: Stores) -> None:
    """Bring a blob in, or find it, as an import does."""
    with stores.content.ingest(f"blob {name}", lease="mine") as writer:
        writer.write(name.encode())
        writer.commit()


def put_expected(name: str, stores: Stores) -> None:
    with stores.content.ingest(f"blob {name}", lease="mine", expected=digest(name)) as writer:
        writer.write(name.encode())
        writer.commit()


def begin(name: str, stores: Stores) -> None:
    """Begin to bring a blob in, for `finish`."""
    writer = stores.content.ingest("long", lease="mine")
    writer.write(name.encode())
    _writers[stores.namespace] = writer


def finish(stores: Stores) -> None:
    if stores.namespace in _writers:
        _writers.pop(stores.namespace).commit()


def label(name: str, labels: Labels, stores: Stores) -> None:
    stores.content.update(digest(name), labels)


def tag(target: str, stores: Stores) -> None:
    descriptor = Descriptor(media_type=MANIFEST, digest=digest(target), size=6)
    stores.images.put_all({"new": descriptor})


def untag(name: str, stores: Stores) -> None:
    stores.images.remove(f"example.org/{name}:1")


def delete(name: str, stores: Stores) -> None:
    remove_blob(stores.root.meta, stores.namespace, digest(name))


def _lineage(stores: Stores) -> MetaStore:
    return MetaStore(stores.root.meta, _SNAPSHOTS, stores.namespace)


def stat(key: str, stores: Stores) -> None:
    _lineage(stores).get(key, lease="mine")


def prepare(key: str, parent: str, stores: Stores) -> None:
    _lineage(stores).create(key, Kind.ACTIVE, parent, {}, "")


def view(key: str, parent: str, stores: Stores) -> None:
    _lineage(stores).create(key, Kind.VIEW, parent, {}, "mine")


def commit(key: str, name: str, parent: str | None, stores: Stores) -> None:
    step = Commit(name=name, key=key, parent=parent, lease="mine")
    _lineage(stores).commit(Committing(step, Usage(1, 1)))


def label_snapshot(key: str, labels: Labels, stores: Stores) -> None:
    _lineage(stores).update(key, labels)


def remove_snapshot(key: str, stores: Stores) -> None:
    _lineage(stores).remove(key)


def release(key: str, stores: Stores) -> None:
    _lineage(stores).release(key)


def prolong(lease: str, stores: Stores) -> None:
    with stores.root.meta.write() as txn:
        record = LEASES.get(txn, stores.namespace, lease)
        if record is not None:
            changed = msgspec.structs.replace(record, labels={**record.labels, _EXPIRE: _FUTURE})
            ledger.put(txn, stores.namespace, changed)


def prolong_image(name: str, stores: Stores) -> None:
    with stores.root.meta.write() as txn:
        record = ledger.get(txn, stores.namespace, Node("images", "", f"example.org/{name}:1"))
        if isinstance(record, Image):
            ledger.put(txn, stores.namespace, msgspec.structs.replace(record, labels={}))


def drop_lease(lease: str, stores: Stores) -> None:
    with stores.root.meta.write() as txn:
        ledger.drop(txn, stores.namespace, Node("leases", "", lease))


def end_work(lease: str, stores: Stores) -> None:
    give_up(stores.root.meta, stores.namespace, lease)


_TAKES = {"drop_lease", "end_work", "untag", "delete", "remove_snapshot"}  # what takes, all else adds


# -- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Where a collection begins, and what others may do."""

    make: Callable[[Maker], None]
    operations: list[partial[None]] = field(default_factory=list)


def _manifest(maker: Maker) -> None:
    maker.blob("m", ref("c", "l"))
    maker.blob("c")
    maker.blob("l")


def _named(maker: Maker) -> None:
    _manifest(maker)
    maker.image("a", "m")


def _expired(maker: Maker) -> None:
    _manifest(maker)
    maker.image("a", "m", {_EXPIRE: _PAST})


def _leased(maker: Maker) -> None:
    maker.blob("m", ref("l"))
    maker.blob("l")
    maker.lease("old", {_EXPIRE: _PAST}, blob_node("m"), blob_node("l"))


def _flat(maker: Maker) -> None:
    maker.blob("m", ref("l"))
    maker.blob("l")
    maker.blob("n")
    maker.lease("flat", {_FLAT: ""}, blob_node("m"))


def _chain(maker: Maker) -> None:
    maker.snapshot("p")
    maker.snapshot("s", "p")
    maker.snapshot("t", "s")
    maker.blob("c", snapshot_ref("t"))


def _working(maker: Maker) -> None:
    maker.lease("dead", {}, snapshot_node("p"), dead=True)
    maker.snapshot("p")
    maker.snapshot("s", "p", kind=Kind.ACTIVE, lease="dead")
    maker.snapshot("q")


def _backwards(maker: Maker) -> None:
    maker.blob("p")
    maker.blob("b", bref("p"))
    maker.blob("c", bref("b"))


def _round(maker: Maker) -> None:
    maker.blob("d")  # its digest comes before theirs
    maker.blob("m", ref("n", "d"))
    maker.blob("n", ref("m"))


def _round_of_snapshots(maker: Maker) -> None:
    maker.snapshot("p")
    maker.snapshot("s", "p", snapshot_ref("t"))
    maker.snapshot("t", "p", snapshot_ref("p", "bref") | snapshot_ref("s"))


def _conditional(maker: Maker) -> None:
    kept = {"containerd.io/gc.cond.snapshot.copy": "usedat<1h|s"}
    maker.blob("m", kept)
    maker.image("a", "m")
    maker.snapshot("p")
    maker.snapshot("s", "p", {"containerd.io/gc.cond.value-usedat": _PAST})


def _coming(maker: Maker) -> None:
    maker.ingest("blob l", "l")
    maker.blob("m", ref("l"))
    maker.ingest("blob n", "n", dead=False)
    maker.blob("n", ref("m"))


def _long(maker: Maker) -> None:
    maker.blob(_LONG)
    maker.blob("l")


CASES = {
    "manifest": Case(
        _manifest,
        [
            partial(use, "m"),
            partial(use, "l"),
            partial(put, "l"),
            partial(put_expected, "m"),
            partial(put, "x"),
            partial(label, "l", {_ROOT: "x"}),
            partial(label, "c", ref("l")),
            partial(label, "m", {"containerd.io/gc.ref.content.l": ""}),
            partial(tag, "m"),
            partial(delete, "m"),
            partial(end_work, "mine"),
        ],
    ),
    "named": Case(
        _named,
        [
            partial(untag, "a"),
            partial(tag, "m"),
            partial(use, "m"),
            partial(label, "m", {"containerd.io/gc.ref.content.l": ""}),
            partial(label, "c", ref("l")),
            partial(put, "l"),
            partial(drop_lease, "mine"),
        ],
    ),
    "expired image": Case(
        _expired,
        [
            partial(prolong_image, "a"),
            partial(tag, "m"),
            partial(untag, "a"),
            partial(use, "c"),
            partial(delete, "m"),
        ],
    ),
    "expired lease": Case(
        _leased,
        [
            partial(prolong, "old"),
            partial(drop_lease, "old"),
            partial(end_work, "old"),
            partial(use, "m"),
            partial(tag, "m"),
            partial(delete, "m"),
            partial(put, "m"),
        ],
    ),
    "flat lease": Case(
        _flat,
        [
            partial(label, "l", ref("n")),
            partial(label, "m", ref("n")),
            partial(use, "m"),
            partial(tag, "m"),
            partial(drop_lease, "flat"),
            partial(label, "n", ref("m")),
            partial(use, "n"),
        ],
    ),
    "chain": Case(
        _chain,
        [
            partial(stat, "s"),
            partial(prepare, "new", "s"),
            partial(view, "seen", "t"),
            partial(commit, "new", "u", None),
            partial(label, "c", {_ROOT: ""}),
            partial(label, "c", {_ROOT: "x"}),
            partial(use, "c"),
            partial(remove_snapshot, "t"),
            partial(label_snapshot, "p", {_ROOT: "x"}),
            partial(drop_lease, "mine"),
        ],
    ),
    "dead work": Case(
        _working,
        [
            partial(release, "s"),
            partial(commit, "s", "done", None),
            partial(commit, "s", "done", "p"),
            partial(stat, "p"),
            partial(stat, "s"),
            partial(prepare, "new", "q"),
            partial(remove_snapshot, "s"),
            partial(end_work, "dead"),
        ],
    ),
    "backwards": Case(
        _backwards,
        [
            partial(use, "p"),
            partial(tag, "p"),
            partial(use, "b"),
            partial(label, "c", bref("p")),
            partial(label, "c", {"containerd.io/gc.bref.content": ""}),
            partial(put, "p"),
            partial(delete, "p"),
        ],
    ),
    "round": Case(
        _round,
        [
            partial(use, "d"),
            partial(use, "m"),
            partial(tag, "n"),
            partial(put, "m"),
            partial(label, "n", {"containerd.io/gc.ref.content.m": ""}),
        ],
    ),
    "round of snapshots": Case(
        _round_of_snapshots,
        [
            partial(stat, "p"),
            partial(stat, "t"),
            partial(prepare, "new", "s"),
            partial(remove_snapshot, "t"),
            partial(label_snapshot, "t", snapshot_ref("p", "bref") | snapshot_ref("", "ref")),
        ],
    ),
    "condition": Case(
        _conditional,
        [
            partial(label_snapshot, "s", {"containerd.io/gc.cond.value-usedat": _FUTURE}),
            partial(label, "m", {"containerd.io/gc.cond.snapshot.copy": "usedat>1h|s"}),
            partial(label, "m", {"containerd.io/gc.cond.snapshot.copy/2": "usedat>1h|p"}),
            partial(untag, "a"),
            partial(stat, "p"),
            partial(prepare, "new", "s"),
        ],
    ),
    "coming": Case(
        _coming,
        [
            partial(put_expected, "l"),
            partial(put, "l"),
            partial(put, "n"),
            partial(use, "m"),
            partial(delete, "n"),
            partial(tag, "m"),
        ],
    ),
}


CASES["long"] = Case(
    _long,
    [
        partial(begin, _LONG),
        partial(finish),
        partial(tag, _LONG),
        partial(delete, _LONG),
        partial(label, "l", {"containerd.io/gc.ref.content": digest(_LONG)}),
        partial(use, "l"),
        partial(end_work, "mine"),
    ],
)


# -- one schedule -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    """One root for all schedules, each of which has a namespace of its own."""
    with shared_memory() as folder, Root(folder / "root") as opened:
        yield opened


class Watch:
    """Holds the records against the closure after each step of the collector and of others."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._world = self.world()
        self.there = set(self._world)
        self._touched: set[Name] = set()
        self._alone: set[Name] = set()
        self.deleted: set[Name] = set()

    def world(self) -> World:
        root = self._stores.root
        with root.meta.read() as txn:
            return world_of(txn, self._stores.namespace, [_SNAPSHOTS], root.owners.me.id, now())

    def collected(self) -> None:
        """Check what the collector did since the last step."""
        before, self._world = self._world, self.world()
        at = now() / 1e9
        lost = before.keys() - self._world.keys()
        assert not lost & closure(before, at), "GC-01: something reachable was deleted"
        assert not lost & grown(before, self._touched, at), "GC-01: something touched was deleted"
        self._alone |= held_alone(before, at)  # what a mark found so may lose what its labels name
        broken = [holder for holder, _ in broken_by(before, self._world, at)]
        assert self._alone.issuperset(broken), "GC-04: something lost a part"
        assert not parents_missing(self._world), "GC-03: a snapshot without its parent"
        kept = before.keys() - lost
        assert all(before[name] == self._world[name] for name in kept), "something was changed"
        self.deleted |= lost

    def forget(self) -> None:
        """Let what was touched be: the collection that it came in is over."""
        self._touched.clear()

    def others(self, operation: Operation, *, marked: bool) -> None:
        """Let others do something, and note what they touched."""
        before = self._world
        with suppress(EngineError):  # what it works on may be gone
            operation(self._stores)
        self._world = self.world()
        if marked:
            changed = {name for name, thing in self._world.items() if before.get(name) != thing}
            members = {one for name in changed for one in self._world[name].members}
            was = {one for thing in before.values() for one in thing.members}
            self._touched |= changed | (members - was)
        self._touched &= self._world.keys()
        assert not parents_missing(self._world), "GC-03: a snapshot without its parent"


def run(root: Root, case: Case, schedule: list[tuple[int, Operation]]) -> tuple[Watch, int]:
    """Collect while others do what a schedule says; return what was seen, and how many steps."""
    stores = Stores(root, f"n{next(_COUNT)}", AMD64)
    with root.meta.write() as txn:
        maker = Maker(txn, stores.namespace, root.owners.me)
        case.make(maker)
        maker.lease("mine", {})
    watch = Watch(stores)
    places = Places(namespace=stores.namespace, backends=[_SNAPSHOTS])
    ahead = list(schedule)

    def between(step: int) -> None:
        watch.collected()
        while ahead and ahead[0][0] <= step:
            watch.others(ahead.pop(0)[1], marked=step > 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "_SLICE", 1)
        with meddled(patch, root.meta, between) as passed:
            collect(root.meta, places)
    steps = len(passed)
    between(_END)  # some end sooner: what comes first leaves them less to do
    if schedule:
        watch.forget()
        collect(root.meta, places)
    # Nobody has worked since it began: that one leaves exactly what is reachable.
    kept = closure(watch.world(), now() / 1e9)
    watch.collected()
    assert watch.world().keys() == kept, "GC-02: garbage was left"
    with root.meta.read() as txn:
        assert not list(ledger.MARKS.scan(txn, stores.namespace))
        assert not list(ledger.TOUCHED.scan(txn, stores.namespace))
    return watch, steps


def _adds(operation: partial[None]) -> bool:
    takes_label = any("" in part.values() for part in operation.args if isinstance(part, dict))
    return operation.func.__name__ not in _TAKES and not takes_label


def _told(operations: Iterable[partial[None]]) -> str:
    return ", ".join(f"{one.func.__name__}{one.args}" for one in operations)


@given(edges=st.dictionaries(st.integers(0, 6), st.sets(st.integers(0, 6), max_size=3)))
def test_holders_come_first_but_where_they_go_round(edges):
    def following(node: int) -> set[int]:
        return edges.get(node, set())

    first = holders_first(range(6), following)
    for order in (first, by_level(first, following, str)):
        assert sorted(order) == list(range(6))
        for holder, held in product(order, repeat=2):
            if held in following(holder) and holder not in reachable([held], following):
                assert order.index(holder) < order.index(held)


@pytest.mark.parametrize("name", CASES)
def test_p1_p3_gc_01_03_04_05_07_one_operation_at_any_moment(root, name):
    case = CASES[name]
    alone, steps = run(root, case, [])
    assert alone.deleted or name in {"named", "condition"}
    for operation, step in product(case.operations, range(steps + 1)):
        watch, _ = run(root, case, [(step, operation)])
        if _adds(operation) and step < steps:
            assert watch.deleted & alone.there <= alone.deleted, f"GC-07: {_told([operation])}"


@pytest.mark.parametrize("name", CASES)
def test_p1_p3_gc_01_03_04_05_18_two_operations_at_any_moments(root, name):
    case = CASES[name]
    _, steps = run(root, case, [])
    moments = combinations_with_replacement(range(steps + 1), 2)
    schedules = product(moments, product(case.operations, repeat=2))
    for (first, second), (one, other) in islice(schedules, 0, None, _STRIDE):
        run(root, case, [(first, one), (second, other)])
