"""The mounts of commands and containers: what is mounted where, of which snapshot, since which boot.

Sync; safe from any thread and process. A record is a claim: it comes before the snapshot and the mount,
and goes after them. Whoever changes one holds it by a lease of its own; a record whose lease is dead is
what a crash left, for anyone to clear. Every change is made only to the record that was read. Those of
a container are its own: they are made, held and removed with its record (`metadata.provisions`).

    changing   someone is mounting, unmounting or clearing it, while `lease` lives
    mounted    it was mounted; the kernel's table says whether it still is
    kept       not mounted, writable: what was written is there
    lazy       out of sight but perhaps in use, until this boot ends
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from engine.errors import AlreadyExists, DataLoss, FailedPrecondition
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import CONTAINERS, LEASES, MOUNTS, SNAPSHOTS, MountRecord, now
from engine.kv.table import Damaged
from engine.metadata.leases import is_live, leased

__all__ = ["MountRecord", "MountState", "MountStore", "same_place"]


class MountState(StrEnum):
    """The states of a record."""

    CHANGING = "changing"
    MOUNTED = "mounted"
    KEPT = "kept"
    LAZY = "lazy"


def same_place(one: MountRecord, other: MountRecord) -> bool:
    """Say whether two records claim one target of one mount namespace."""
    return (one.target, one.space, one.boot) == (other.target, other.space, other.boot)


class MountStore:
    """The mount records of one namespace."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def walk(self) -> list[MountRecord]:
        """Return all records that can be read, by target."""
        with self._meta.read() as txn:
            found, _ = MOUNTS.survey(txn, self._namespace)
        return sorted(found, key=lambda record: (record.target, record.created))

    def damaged(self) -> list[Damaged]:
        """Return the keys whose records cannot be read: what those claim, nobody knows."""
        with self._meta.read() as txn:
            return MOUNTS.survey(txn, self._namespace)[1]

    def everywhere(self) -> list[MountRecord]:
        """Return the records of all namespaces: they share the machine's folders."""
        with self._meta.read() as txn:
            return MOUNTS.survey(txn)[0]

    def get(self, key: str) -> MountRecord | None:
        """Return the record of a snapshot key."""
        with self._meta.read() as txn:
            return MOUNTS.get(txn, self._namespace, key)

    def is_held(self, record: MountRecord) -> bool:
        """Say whether someone is changing it now."""
        with self._meta.read() as txn:
            return self._is_held(txn, record)

    def _is_held(self, txn: Transaction, record: MountRecord) -> bool:
        if record.state != MountState.CHANGING:
            return False
        # The lease of any namespace, as the record may be another's; its ID is random.
        found, damaged = LEASES.survey(txn)
        held = [lease for lease in found if lease.id == record.lease]
        if not held:
            return record.lease in {lease.name for lease in damaged}
        return any(is_live(self._meta.owners, lease, now()) for lease in held)

    def has_snapshot(self, record: MountRecord) -> bool:
        """Say whether its snapshot is there and whole; one whose making a crash cut off is not."""
        with self._meta.read() as txn:
            try:
                snapshot = SNAPSHOTS.get(txn, record.backend, self._namespace, record.key)
            except DataLoss:
                return True  # what it says is lost, its files are not
            return snapshot is not None and not snapshot.lease

    def has_container(self, record: MountRecord) -> bool:
        """Say whether it is that of a container which is there."""
        with self._meta.read() as txn:
            return bool(record.container) and CONTAINERS.any(txn, self._namespace, record.container)

    @contextmanager
    def claimed(
        self, record: MountRecord, *, over: MountRecord | None, takes_target: bool = False
    ) -> Iterator[MountRecord]:
        """Hold a record for the length of a block; the block says what becomes of it.

        `over` is what stands in its place, if anything does. FailedPrecondition if that was changed by
        someone else, or if the target is to be taken and someone works on it; AlreadyExists if the key
        is taken. Whether anything is mounted at the target is the kernel's to say, once it is held.
        """
        with leased(self._meta, self._namespace) as lease:
            mine = msgspec.structs.replace(record, state=MountState.CHANGING, lease=lease)
            with self._meta.write() as txn:
                if takes_target:
                    self._check_free(txn, mine)
                found = MOUNTS.get(txn, self._namespace, mine.key)
                if found is not None and over is None:
                    raise AlreadyExists(
                        f"a mount named {mine.key} exists; choose another (`lamina mounts` lists them)"
                    )
                if found != over:
                    raise FailedPrecondition(f"mount {mine.key} is being changed; try again")
                MOUNTS.put(txn, mine, self._namespace, mine.key)
            yield mine

    def _check_free(self, txn: Transaction, mine: MountRecord) -> None:
        for other in MOUNTS.survey(txn)[0]:
            if same_place(other, mine) and self._is_held(txn, other):
                raise FailedPrecondition(
                    f"{mine.target} is being mounted or unmounted by another process "
                    "or namespace; try again once that is done"
                )

    def swap(self, old: MountRecord, new: MountRecord) -> bool:
        """Put a record in the place of another; False if that is not what is there."""
        with self._meta.write() as txn:
            if MOUNTS.get(txn, self._namespace, old.key) != old:
                return False
            MOUNTS.put(txn, new, self._namespace, new.key)
            return True

    def drop(self, old: MountRecord) -> bool:
        """Remove a record; False if it is not what is there."""
        with self._meta.write() as txn:
            if MOUNTS.get(txn, self._namespace, old.key) != old:
                return False
            return MOUNTS.delete(txn, self._namespace, old.key)

    def forget(self, key: str) -> None:
        """Remove the record of a snapshot key, whether or not it can be read."""
        with self._meta.write() as txn:
            MOUNTS.delete(txn, self._namespace, key)
