"""Finds and drops garbage while everyone goes on working: a mark, then a sweep in short transactions.

Sync. The mark reads one snapshot of the records (`engine.gc.survey`). Before it begins, a record in
`marks` makes the ledger note what is touched from then on. Each transaction of the sweep first takes
what was touched, and all that it holds, off the list, and then drops some of what is left: so nothing
goes that was made, found, named or referred to since the mark. Holders go before what they hold: at any
moment, and after a crash, what is there is as complete as it was.

Only records go here; `ContentStore.cleanup` and `Snapshotter.cleanup` delete bytes and folders later.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

import msgspec

from engine import limits
from engine.content import discard
from engine.errors import Unavailable
from engine.failpoints import hit
from engine.gc.clock import look, time_of
from engine.gc.survey import Places, Survey, survey
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import TOUCHED, Blob, Clock, Snapshot
from engine.metadata import ledger, lineage, marks
from engine.metadata.leases import finish
from engine.metadata.nodes import CONTENT, IMAGE, INGEST, LEASE, SNAPSHOT, Node, token
from engine.processes import Owner
from engine.progress import Report, Step, silent
from engine.snapshots import Leftover

__all__ = ["Collected", "collect"]

_SLICE = 256  # records dropped in one transaction at most,
_SLICE_S = 0.002  # and for so long; the same for sparing
# Changes after which one ends. Each takes a page or two, as it may be anywhere; a commit writes 100
# pages in about a millisecond, and waits for the disk however few they are.
_CHANGES = 208
_SPARED = 256  # records of what was touched that are looked at in one
_RELEASE_EVERY = 1 << 14  # records dropped: what that reads counts as memory of the process
_S = 10**9
_POLL_S = 0.05  # another process cannot tell us that it is done


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection dropped, or would drop; sizes in bytes."""

    blobs: list[str]
    snapshots: list[Node]
    ingests: list[str]
    leases: list[str]
    images: list[str] = []
    """Names that had expired."""
    blob_bytes: int
    snapshot_bytes: int
    expires: int | None = None
    """When the next lease or name expires, in nanoseconds since the epoch."""
    left: list[Leftover] = []
    """Files that could not be deleted yet."""
    is_halted: bool = False
    """Whether no blob, snapshot or image could go, as some record cannot be read."""
    errors: list[str] = []
    """What was kept because it, or what holds it, cannot be read or used."""

    def with_more(self, later: "Collected") -> "Collected":
        """Return what this and a later collection dropped together."""
        return msgspec.structs.replace(
            later,
            blobs=sorted({*self.blobs, *later.blobs}),
            snapshots=[*self.snapshots, *later.snapshots],
            ingests=[*self.ingests, *later.ingests],
            leases=[*self.leases, *later.leases],
            images=[*self.images, *later.images],
            blob_bytes=self.blob_bytes + later.blob_bytes,
            snapshot_bytes=self.snapshot_bytes + later.snapshot_bytes,
        )


def collect(
    meta: Environment,
    places: Places,
    *,
    dry_run: bool = False,
    report: Report = silent,
    paused: Callable[[float], None] = lambda _seconds: None,
) -> Collected:
    """Drop the records of all garbage of a namespace and return what that was.

    With `dry_run` only return it. Several may be asked to at once, in any process: one collects at a
    time, the others wait, for which `report` is told. `paused` is told how long each step kept others
    from writing. Raises Unavailable if that one does not get on.
    """
    if dry_run:
        with meta.read() as txn:
            clock = look(txn, note=False)
            found, garbage = survey(meta, txn, places, time_of(clock))
            tally, folders = _Tally(), lineage.Folders()
            for node in garbage:
                record = ledger.get(txn, places.namespace, node)
                frees = not isinstance(record, Snapshot) or folders.is_last(
                    txn, places.namespace, node, record
                )
                tally.add(txn, places.namespace, node, record, frees=frees)
            return tally.result(found, clock)
    with _marking(meta, places.namespace, report) as (clock, beat):
        with meta.read() as txn:
            found, garbage = survey(meta, txn, places, time_of(clock), beat)
        found.forget()
        hit("gc.marked")
        tally = _sweep(meta, places.namespace, found, garbage, report, beat, paused)
    return tally.result(found, clock)


# -- the mark ---------------------------------------------------------------------------------------


@contextmanager
def _marking(
    meta: Environment, namespace: str, report: Report
) -> Iterator[tuple[Clock, Callable[[], None]]]:
    """Have everyone note what they touch, for the length of a block.

    Give the time, and what tells those who wait that the block gets on.
    """
    try:
        with meta.owners.at_work() as owner:
            yield _begun(meta, namespace, owner, report), partial(meta.owners.beat, owner)
    finally:
        marks.end(meta, namespace)


def _begun(meta: Environment, namespace: str, owner: Owner, report: Report) -> Clock:
    """Begin a mark as soon as nobody else is at it; return the time."""
    waiting, seen, since = "", (owner, 0), time.monotonic()
    while isinstance(busy := _begin(meta, namespace, owner), Owner):
        waiting = f"{busy} is collecting"
        if (now := (busy, meta.owners.beaten(busy))) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > limits.COLLECT_WAIT_S:
            raise Unavailable(
                f"{waiting} and has not got on for {limits.COLLECT_WAIT_S} s; see whether it was stopped"
            )
        report(Step.WAIT, waiting, 1, 0)
        time.sleep(_POLL_S)
    if waiting:
        report(Step.WAIT, waiting, 1, 1)
    return busy


def _begin(meta: Environment, namespace: str, owner: Owner) -> Clock | Owner:
    """Begin a mark and return the time, or who is at it if somebody is."""
    while True:
        with meta.write() as txn:
            if other := marks.collector(meta.owners, txn, namespace):
                return other
            if marks.begin(txn, namespace, owner):
                return look(txn, note=True)


# -- the sweep --------------------------------------------------------------------------------------


def _sweep(
    meta: Environment,
    namespace: str,
    found: Survey,
    garbage: list[Node],
    report: Report,
    beat: Callable[[], None],
    paused: Callable[[float], None],
) -> "_Tally":
    left = dict.fromkeys(garbage)
    sparing = _Sparing(namespace, left, found.alone)
    order = iter(garbage)
    tally = _Tally()
    total, released, more = len(garbage), len(garbage), True
    while more:
        beat()
        report(Step.SWEEP, "records", total, total - len(left))
        with meta.write() as txn:
            since = time.monotonic()
            if sparing.step(txn):
                more = _drop_some(txn, namespace, order, left, tally)
        paused(time.monotonic() - since)
        hit("gc.swept")
        if released - len(left) >= _RELEASE_EVERY:
            released = len(left)
            meta.release_pages()
    finish(meta, namespace)
    report(Step.SWEEP, "records", total, total)
    return tally


class _Sparing:
    """Takes what was touched since the mark, and all that it holds, off the list of garbage."""

    def __init__(self, namespace: str, left: dict[Node, None], alone: Collection[Node]) -> None:
        self._namespace = namespace
        self._left = left
        self._alone = alone
        self._touched: set[Node] = set()
        self._seen: set[Node] = set()
        self._pending: list[Node] = []

    def step(self, txn: Transaction) -> bool:
        """Do so for a short time; say whether that was all."""
        end = time.monotonic() + _SLICE_S
        records = list(islice(TOUCHED.each(txn, self._namespace), _SPARED))
        touched = [Node(one.kind, one.backend, one.key) for one in records]
        for node in touched:
            TOUCHED.delete(txn, self._namespace, token(node))
        self._touched.update(touched)
        self._seen.difference_update(touched)  # what it has come to hold since it was seen counts
        self._pending += touched
        while self._pending:
            self._spare(txn, self._pending.pop())
            if time.monotonic() > end:
                break
        if self._pending or len(records) == _SPARED:
            return False
        self._touched.clear()
        self._seen.clear()
        return True

    def _spare(self, txn: Transaction, node: Node) -> None:
        if node in self._seen:
            return
        self._seen.add(node)
        # What was held whole when the mark was made holds what it held then, and what it has come to
        # hold since was touched as well.
        if node in self._left or node in self._touched or node in self._alone:
            self._left.pop(node, None)
            self._pending += ledger.held(txn, self._namespace, node)


def _drop_some(
    txn: Transaction,
    namespace: str,
    order: Iterator[Node],
    left: dict[Node, None],
    tally: "_Tally",
) -> bool:
    """Drop some of what is left; say whether there may be more."""
    end = time.monotonic() + _SLICE_S
    for _ in range(_SLICE):
        node = next((node for node in order if node in left), None)
        if node is None:
            return False
        del left[node]
        record = _drop(txn, namespace, node)
        frees = not isinstance(record, Snapshot) or not lineage.has_folder(
            txn, node.backend, namespace, record
        )
        tally.add(txn, namespace, node, record, frees=frees)
        if txn.changes > _CHANGES or time.monotonic() > end:
            break
    return True


def _drop(txn: Transaction, namespace: str, node: Node) -> object:
    """Drop a node's record and return it; None if it is not there, or has children still."""
    if node.kind == CONTENT:
        return discard.drop_blob(txn, namespace, node.key)
    if node.kind not in {INGEST, SNAPSHOT}:
        return ledger.drop(txn, namespace, node)
    record = ledger.get(txn, namespace, node)
    if node.kind == INGEST:
        discard.drop_ingest(txn, namespace, node.key)
    elif isinstance(record, Snapshot):
        if ledger.has_children(txn, node.backend, namespace, node.key):
            return None
        lineage.drop(txn, node.backend, namespace, record)
    return record


class _Tally:
    """Counts what is dropped."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = {CONTENT: [], INGEST: [], LEASE: [], IMAGE: []}
        self._snapshots: list[Node] = []
        self._blob_bytes = 0
        self._snapshot_bytes = 0

    def add(self, txn: Transaction, namespace: str, node: Node, record: object, *, frees: bool) -> None:
        """Note what was dropped, or would be; bytes that another namespace has too do not count.

        Nor does the folder of a snapshot unless its going `frees` that.
        """
        if record is None:
            return
        if node.kind == SNAPSHOT:
            self._snapshots.append(node)
        else:
            self._keys[node.kind].append(node.key)
        if isinstance(record, Snapshot):
            self._snapshot_bytes += record.size if frees else 0
        elif isinstance(record, Blob) and not ledger.is_elsewhere(txn, namespace, record):
            self._blob_bytes += record.size

    def result(self, found: Survey, clock: Clock) -> Collected:
        expires, errors = found.expires, found.damaged
        if clock.is_doubted and expires is not None:
            grace = clock.doubted_until - clock.boottime
            expires = max(expires, clock.wall + grace)
            errors = [
                *errors,
                f"what expires: the clock was set anew, and is believed in {grace // _S} s",
            ]
        return Collected(
            blobs=sorted(self._keys[CONTENT]),
            snapshots=self._snapshots,
            ingests=self._keys[INGEST],
            leases=self._keys[LEASE],
            images=self._keys[IMAGE],
            blob_bytes=self._blob_bytes,
            snapshot_bytes=self._snapshot_bytes,
            expires=expires,
            is_halted=bool(found.damaged),
            errors=errors,
        )
