"""Mends records that are not right, each in a transaction that looks again. Sync."""

from collections.abc import Callable

from engine.errors import DataLoss, FailedPrecondition
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import COUNTERS, MARKS, TRASH, UNFLUSHED, Trash
from engine.metadata import ledger, marks
from engine.metadata.nodes import LEASE, Node

__all__ = [
    "IsUsed",
    "drop_items",
    "drop_note",
    "drop_trash",
    "end_mark",
    "raise_counter",
    "rebuild",
    "spare",
]

IsUsed = Callable[[Transaction], bool]


def rebuild(meta: Environment) -> str:
    """Note anew what follows from the records."""
    with meta.write() as txn:
        ledger.rebuild(txn)
    return "noted anew from all records"


def end_mark(meta: Environment, namespace: str) -> str:
    """End a mark that nobody is at."""
    marks.end(meta, namespace)
    with meta.read() as txn:
        if MARKS.any(txn, namespace):
            raise FailedPrecondition("the namespace is being collected; check once more")
    return "removed: nobody is collecting"


def drop_trash(meta: Environment, kind: str, backend: str) -> str:
    """Remove a trash record that cannot be read."""
    with meta.write() as txn:
        TRASH.drop_damaged(txn, kind, backend)
    return "removed; what it was about belongs to nothing now, and is found by the next check"


def drop_note(meta: Environment, backend: str) -> str:
    """Remove a note of what was not flushed that cannot be read."""
    with meta.write() as txn:
        UNFLUSHED.drop_damaged(txn, backend)
    return "removed; its snapshot is looked at with the others"


def drop_items(meta: Environment, namespace: str, lease: str) -> str:
    """Remove the members of a lease that is not here."""
    node = Node(LEASE, "", lease)
    with meta.write() as txn:
        if ledger.exists(txn, namespace, node):
            raise FailedPrecondition("its lease is here by now; check once more")
        ledger.drop(txn, namespace, node)
    return "removed with all that was its lease's"


def spare(meta: Environment, dead: Trash, is_used: IsUsed) -> str:
    """Take off the trash what a record has."""
    with meta.write() as txn:
        if not is_used(txn):
            raise FailedPrecondition("nothing has it any more; `lamina gc` deletes it")
        TRASH.delete(txn, dead.kind, dead.backend, dead.number)
    return "it is not to be deleted any more"


def raise_counter(meta: Environment, sequence: str, number: int) -> str:
    """Have a sequence go on after what is in use."""
    with meta.write() as txn:
        try:
            last = COUNTERS.last(txn, sequence)
        except DataLoss:
            last = 0
        COUNTERS.set(txn, sequence, max(last, number))
    return f"it goes on after {max(last, number)}"
