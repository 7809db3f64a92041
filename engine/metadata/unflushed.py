"""Which committed snapshots were not flushed: if the machine goes down, the next boot doubts them.

Sync; safe from any thread. A note comes in the transaction that commits the snapshot. It goes after a
flush that began when it was there already, or once the snapshot was checked (`engine.doubts`). What it
is about may be gone by then, or have another folder.
"""

from collections.abc import Iterable

from engine.errors import DataLoss, os_errors
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import COUNTERS, UNFLUSHED, Snapshot, Unflushed, now
from engine.processes import boot_id

__all__ = ["check", "clear", "doubted", "forget", "last", "note", "waiting"]

_SEQUENCE = "unflushed"


def _this_boot() -> str:
    with os_errors("looking for what names this boot of the machine"):
        return boot_id()


def note(txn: Transaction, backend: str, namespace: str, record: Snapshot) -> None:
    """Note that a snapshot that is being committed was not flushed."""
    made = Unflushed(
        namespace=namespace,
        key=record.key,
        id=record.id,
        number=COUNTERS.next(txn, _SEQUENCE),
        boot=_this_boot(),
        at=now(),
    )
    UNFLUSHED.put(txn, made, backend, record.id)


def last(txn: Transaction, backend: str) -> int:
    """Return the number of the last note, for `clear` after a flush; 0 if there is nothing to flush."""
    return COUNTERS.last(txn, _SEQUENCE) if UNFLUSHED.any(txn, backend) else 0


def clear(txn: Transaction, backend: str, number: int) -> None:
    """Remove the notes up to a number: what they are about has been flushed since.

    Those of another boot stay: what was lost then no flush brings back.
    """
    if number:
        boot = _this_boot()
        for found in UNFLUSHED.scan(txn, backend):
            if found.number <= number and found.boot == boot:
                UNFLUSHED.delete(txn, backend, found.id)


def check(txn: Transaction, backend: str, record: Snapshot) -> None:
    """Raise DataLoss for a snapshot that the machine going down has put in doubt."""
    found = UNFLUSHED.get(txn, backend, record.id)
    if found is not None and found.boot != _this_boot():
        raise DataLoss(
            f"snapshot {record.key} was not flushed when the machine went down, and is not checked "
            "since; `lamina fsck --repair` says what is wrong"
        )


def doubted(meta: Environment) -> list[tuple[str, Unflushed]]:
    """Return what another boot left unflushed, each with its backend."""
    return [found for found in _notes(meta) if found[1].boot != _this_boot()]


def waiting(meta: Environment) -> dict[str, int]:
    """Return the backends for which something is unflushed since this boot began, and since when."""
    return {
        backend: found.at  # the last of each: its number is the highest
        for backend, found in sorted(_notes(meta), key=lambda one: one[1].number)
        if found.boot == _this_boot()
    }


def _notes(meta: Environment) -> list[tuple[str, Unflushed]]:
    with meta.read() as txn:
        if not UNFLUSHED.any(txn):
            return []
        return [
            (names[0], found)
            for names, found in UNFLUSHED.entries(txn)
            if isinstance(found, Unflushed)  # what cannot be read `fsck` tells
        ]


def forget(meta: Environment, notes: Iterable[tuple[str, Unflushed]]) -> None:
    """Remove notes that are as they were read: what they are about is right, or gone."""
    with meta.write() as txn:
        for backend, found in notes:
            if UNFLUSHED.get(txn, backend, found.id) == found:
                UNFLUSHED.delete(txn, backend, found.id)
