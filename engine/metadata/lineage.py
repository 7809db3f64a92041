"""The lineage of snapshots: which there are, of what kind, and on what they stand.

Sync; safe from any thread. Records only: folders are the backend's. Every rule of the contract's
error table that concerns keys, kinds and parents is enforced here, once for all backends. Ids are
given out once and never again; a snapshot keeps its id from prepare through commit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import msgspec

from engine import labels as label_rules
from engine.errors import (
    AlreadyExists,
    DataLoss,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.fieldpaths import change_labels
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import COUNTERS, SNAPSHOTS, TRASH, Blob, Snapshot, Trash, now
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import leases, ledger, unflushed
from engine.metadata.digests import full_name
from engine.metadata.nodes import LEASE, Node, blob_node, snapshot_node
from engine.snapshots import Commit, Info, Kind, Usage

__all__ = ["Committing", "Folders", "MetaStore", "drop", "full_key", "has_folder", "info_of"]

_KIND = "snapshot"
_FORGOTTEN = 500  # records in one transaction: a millisecond


def info_of(record: Snapshot) -> Info:
    """Return a record as the contract shows it."""
    return Info(
        key=record.key,
        kind=Kind(record.kind),
        parent=record.parent,
        created=record.created,
        updated=record.updated,
        labels=record.labels,
    )


def full_key(meta: Environment, backend: str, namespace: str, text: str) -> str | None:
    """Return the key of the committed snapshot whose chain ID begins as `text`, or None.

    InvalidArgument if there are several.
    """
    with meta.read() as txn:
        return full_name(SNAPSHOTS, txn, backend, namespace, text=text, name=lambda record: record.key)


def drop(txn: Transaction, backend: str, namespace: str, record: Snapshot) -> None:
    """Drop a snapshot that has no children; its folder is trash once no other has it."""
    ledger.drop(txn, namespace, snapshot_node(backend, record.key))
    _abandon(txn, backend, namespace, record)


def _abandon(txn: Transaction, backend: str, namespace: str, record: Snapshot) -> None:
    """Make trash of the folders of a record that is gone, as far as no other has them."""
    for number in record.folders:
        if not ledger.has_folder(txn, backend, namespace, record.diff_id, number):
            trash = Trash(kind=_KIND, backend=backend, number=number)
            TRASH.put(txn, trash, _KIND, backend, number)


def has_folder(txn: Transaction, backend: str, namespace: str, record: Snapshot) -> bool:
    """Say whether any snapshot has the folder of a record that is gone."""
    return ledger.has_folder(txn, backend, namespace, record.diff_id, record.id)


@dataclass(frozen=True, slots=True)
class Committing:
    """A step of a commit whose data is in place, and what that takes up."""

    step: Commit
    usage: Usage
    is_flushed: bool = True
    """Whether its data is durable; else it is noted that it is not."""
    shares: bool = False
    """Whether it has the folder that it was made to share, not its own."""


class Folders:
    """Tells, of snapshots that go one by one, when the last of those goes that have one folder."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, int], int] = {}

    def is_last(self, txn: Transaction, namespace: str, node: Node, record: Snapshot) -> bool:
        """Take note that a snapshot goes, whose record is still there."""
        key = (node.backend, record.id)
        left = self._left.get(key)
        if left is None:
            left = sum(1 for _ in ledger.sharers(txn, namespace, node, record))
        self._left[key] = left - 1
        return left <= 1


class MetaStore:
    """The snapshots of one backend in one namespace."""

    def __init__(self, meta: Environment, backend: str, namespace: str) -> None:
        self._meta = meta
        self._backend = backend
        self._namespace = namespace

    def get(self, key: str, *, lease: str = "") -> Snapshot:
        """Return a record; with a lease, pin the snapshot in the same step.

        Raises NotFound, and DataLoss for one that is in doubt.
        """
        with self._meta.write() if lease else self._meta.read() as txn:
            record = self._sound(txn, key)
            self._pin(txn, key, lease)
            return record

    def look(self, key: str) -> Snapshot:
        """Return a record, in doubt or not: for who checks, mends or removes it. Raises NotFound."""
        with self._meta.read() as txn:
            return self._get(txn, key)

    def _sound(self, txn: Transaction, key: str) -> Snapshot:
        record = self._get(txn, key)
        unflushed.check(txn, self._backend, record)
        return record

    def _get(self, txn: Transaction, key: str) -> Snapshot:
        record = SNAPSHOTS.get(txn, self._backend, self._namespace, key)
        if record is None:
            raise NotFound(f"no snapshot {key} in {self._backend}")
        return record

    def walk(self) -> Iterator[Snapshot]:
        """Yield all records, by key; others may write meanwhile. DataLoss where one can't be read."""
        for record in SNAPSHOTS.walk(self._meta, self._backend, self._namespace):
            if isinstance(record, Damaged):
                raise DataLoss(record.error)
            yield record

    def parents(self, key: str, *, in_doubt: bool = False) -> list[Snapshot]:
        """Return what a snapshot stands on, nearest first; DataLoss if some is `in_doubt` unasked."""
        with self._meta.read() as txn:
            get = self._get if in_doubt else self._sound
            return self._parents(txn, self._get(txn, key).parent, get)

    @staticmethod
    def _parents(
        txn: Transaction, name: str, get: Callable[[Transaction, str], Snapshot]
    ) -> list[Snapshot]:
        chain: list[Snapshot] = []
        while name:
            chain.append(get(txn, name))
            name = chain[-1].parent
        return chain

    def create(
        self, key: str, kind: Kind, parent: str, labels: Labels, lease: str | None
    ) -> tuple[Snapshot, list[Snapshot]]:
        """Record a new active snapshot or view; return it and what it stands on, nearest first.

        Work in progress needs a lease, so that a crash before the end leaves no root behind: with None
        it gets one of its own.
        """
        label_rules.check(labels)
        with self._meta.write() as txn:
            record = self._new(txn, key, kind, parent, labels, lease)
            self._put(txn, record)
            self._pin(txn, key, record.lease, made=True)
            return record, self._parents(txn, parent, self._sound)

    def _new(
        self,
        txn: Transaction,
        key: str,
        kind: Kind,
        parent: str,
        labels: Labels,
        lease: str | None,
    ) -> Snapshot:
        if not key:
            raise InvalidArgument("a snapshot needs a key")
        if SNAPSHOTS.get(txn, self._backend, self._namespace, key):
            raise AlreadyExists(f"snapshot {key} exists in {self._backend}")
        if parent and self._sound(txn, parent).kind != Kind.COMMITTED:
            raise InvalidArgument(f"parent {parent} is not committed")
        if lease is None:
            lease = leases.begin(txn, self._namespace, self._meta.owners.me)
        at = now()
        return Snapshot(
            key=key,
            id=COUNTERS.next(txn, "snapshot"),
            kind=kind,
            parent=parent,
            created=at,
            updated=at,
            lease=lease,
            labels=dict(labels),
        )

    def standing(self, diff_id: str, serves: Callable[[int], bool]) -> Snapshot | None:
        """Return a committed snapshot that was verified to be this layer, whose folder `serves`."""
        with self._meta.read() as txn:
            tried = set()
            for found in ledger.with_layer(txn, self._backend, self._namespace, diff_id):
                with suppress(NotFound, DataLoss):
                    record = self._sound(txn, found.key)
                    if found.number in tried or record.kind != Kind.COMMITTED:
                        continue
                    if serves(found.number):
                        return record
                    tried.add(found.number)
        return None

    def share(self, key: str, standing: Snapshot, labels: Labels, lease: str | None) -> Snapshot | None:
        """Record a new active snapshot that keeps the folder of a committed one as long as it lives.

        None if nobody has that folder any more.
        """
        label_rules.check(labels)
        with self._meta.write() as txn:
            if not ledger.has_folder(txn, self._backend, self._namespace, standing.diff_id, standing.id):
                return None
            made = self._new(txn, key, Kind.ACTIVE, "", labels, lease)
            record = msgspec.structs.replace(made, diff_id=standing.diff_id, layer=standing.id)
            self._put(txn, record)
            self._pin(txn, key, record.lease, made=True)
            return record

    def is_shared(self, record: Snapshot) -> bool:
        """Say whether another snapshot has the folder of this one."""
        with self._meta.read() as txn:
            node = snapshot_node(self._backend, record.key)
            found = ledger.sharers(txn, self._namespace, node, record)
            return any(other != node for other in found)

    def has_folder(self, record: Snapshot) -> bool:
        """Say whether any snapshot has the folder of a record that is gone."""
        with self._meta.read() as txn:
            return has_folder(txn, self._backend, self._namespace, record)

    def release(self, key: str, own: str = "") -> None:
        """Let a finished active snapshot or view stand without its lease; one of its `own` ends."""
        with self._meta.write() as txn:
            self._put(txn, msgspec.structs.replace(self._get(txn, key), lease=""))
            if own:
                ledger.drop(txn, self._namespace, Node(LEASE, "", own))

    def check_commit(self, name: str, key: str, parent: str | None) -> tuple[Snapshot, str]:
        """Return the active record and the parent it would have; raise what commit would."""
        with self._meta.read() as txn:
            return self._check_commit(txn, name, key, parent)

    def _check_commit(
        self, txn: Transaction, name: str, key: str, parent: str | None
    ) -> tuple[Snapshot, str]:
        record = self._get(txn, key)
        if record.kind != Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key} is {record.kind}, not active")
        if not name:
            raise InvalidArgument("a snapshot needs a name")
        if name == key or SNAPSHOTS.get(txn, self._backend, self._namespace, name):
            raise AlreadyExists(f"snapshot {name} exists in {self._backend}")
        if record.parent and parent and parent != record.parent:
            raise InvalidArgument(f"snapshot {key} stands on {record.parent}, not on {parent}")
        below = record.parent or parent or ""
        if below and self._sound(txn, below).kind != Kind.COMMITTED:
            raise FailedPrecondition(f"parent {below} is not committed")
        return record, below

    def unflushed(self) -> int:
        """Return what to tell `flushed` after a flush that begins now; 0 if there is nothing to."""
        with self._meta.read() as txn:
            return unflushed.last(txn, self._backend)

    def flushed(self, notes: int) -> None:
        """Note that what was unflushed before is flushed."""
        with self._meta.write() as txn:
            unflushed.clear(txn, self._backend, notes)

    def commit(self, *steps: Committing, flushed: int = 0) -> None:
        """Turn active snapshots into committed ones, in one transaction.

        What `flushed` is about is durable by now. When a step fails, those before it are committed.
        """
        failure: EngineError | None = None
        with self._meta.write() as txn:
            unflushed.clear(txn, self._backend, flushed)
            for one in steps:
                try:
                    self._commit(txn, one)
                except EngineError as error:
                    failure = error
                    break
        if failure is not None:
            raise failure

    def _commit(self, txn: Transaction, one: Committing) -> None:
        """Commit one step; all that can be wrong with it is found out before anything is written."""
        step = one.step
        label_rules.check(step.labels)
        ledger.check_lease(txn, self._namespace, step.lease)
        record, below = self._check_commit(txn, step.name, step.key, step.parent)
        if record.diff_id != step.diff_id and record.layer:
            raise InvalidArgument(f"snapshot {step.key} is layer {record.diff_id}, no other")
        at = now()
        committed = Snapshot(
            key=step.name,
            id=record.layer if one.shares else record.id,
            kind=Kind.COMMITTED,
            parent=below,
            created=at,
            updated=at,
            size=one.usage.size,
            inodes=one.usage.inodes,
            labels=dict(step.labels),
            diff_id=step.diff_id,
        )
        ledger.drop(txn, self._namespace, snapshot_node(self._backend, record.key))
        self._put(txn, committed)
        if record.layer:
            _abandon(txn, self._backend, self._namespace, record)
        if not one.is_flushed:
            unflushed.note(txn, self._backend, self._namespace, committed)
        self._pin(txn, step.name, step.lease, made=True)
        blob = ledger.get(txn, self._namespace, blob_node(step.blob)) if step.blob else None
        if isinstance(blob, Blob):
            about = label_rules.merge(blob.labels, {label_rules.UNCOMPRESSED: step.diff_id})
            ledger.put(txn, self._namespace, msgspec.structs.replace(blob, labels=about, updated=at))

    def replace(self, old: Snapshot, new: Snapshot, usage: Usage) -> None:
        """Give a committed snapshot the folder of an active one, whose data is durable.

        The other folder is trash once no other snapshot has it. FailedPrecondition if either is not as
        it was read.
        """
        with self._meta.write() as txn:
            if (self._get(txn, old.key), self._get(txn, new.key)) != (old, new):
                raise FailedPrecondition(f"snapshot {old.key} was changed meanwhile; try again")
            ledger.drop(txn, self._namespace, snapshot_node(self._backend, new.key))
            made = {"id": new.id, "size": usage.size, "inodes": usage.inodes, "updated": now()}
            self._put(txn, msgspec.structs.replace(old, **made))
            _abandon(txn, self._backend, self._namespace, old)

    def update(self, key: str, labels: Labels, paths: Sequence[str] | None = None) -> Snapshot:
        """Set labels on a snapshot, deleting those whose new value is empty.

        With `paths` as an update by field paths: `labels`, `labels.KEY`, or none for all labels.
        """
        with self._meta.write() as txn:
            record = self._get(txn, key)
            if paths is None:
                changed = label_rules.merge(record.labels, labels)
            else:
                changed = change_labels(record.labels, labels, paths)
            record = msgspec.structs.replace(record, labels=changed, updated=now())
            self._put(txn, record)
            return record

    def remove(self, key: str) -> None:
        """Drop a record; its folder is trash from then on."""
        with self._meta.write() as txn:
            record = self._get(txn, key)
            if ledger.has_children(txn, self._backend, self._namespace, key):
                raise FailedPrecondition(f"snapshot {key} has children; remove those first")
            drop(txn, self._backend, self._namespace, record)
            ledger.note_deletion(txn, self._namespace)

    def trash(self, only: Iterable[int] | None = None) -> list[int]:
        """Return the ids whose folders wait to be deleted, or those of some."""
        with self._meta.read() as txn:
            if only is None:
                return [trash.number for trash in TRASH.survey(txn, _KIND, self._backend)[0]]
            return [number for number in only if TRASH.any(txn, _KIND, self._backend, number)]

    def forget(self, numbers: Iterable[int]) -> None:
        """Note that the folders of removed snapshots are gone, for good; in short transactions."""
        left = iter(numbers)
        while some := list(islice(left, _FORGOTTEN)):
            with self._meta.write() as txn:
                for number in some:
                    TRASH.delete(txn, _KIND, self._backend, number)

    def _put(self, txn: Transaction, record: Snapshot) -> None:
        ledger.put_snapshot(txn, self._backend, self._namespace, record)

    def _pin(self, txn: Transaction, key: str, lease: str, *, made: bool = False) -> None:
        ledger.pin(txn, self._namespace, lease, snapshot_node(self._backend, key), made=made)
