"""Marks: who is collecting a namespace, and what was touched since.

Sync. While there is a mark the ledger notes what is touched. It counts as long as its owner is at work,
who is one for that collection alone: dead when it ends, even where its mark could not be taken away.
What was noted goes in short transactions.
"""

from engine.errors import DataLoss
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import MARKS, TOUCHED, Mark, now
from engine.processes import Owner, Owners

__all__ = ["begin", "collector", "end", "end_dead"]

_SLICE = 1000  # records removed in one transaction: 2 ms


def collector(owners: Owners, txn: Transaction, namespace: str) -> Owner | None:
    """Return who is collecting a namespace; a mark that cannot be read is nobody's."""
    try:
        mark = MARKS.get(txn, namespace)
    except DataLoss:
        return None
    return mark.owner if mark and owners.is_alive(mark.owner.id) else None


def begin(txn: Transaction, namespace: str, owner: Owner) -> bool:
    """Begin a mark where nobody is collecting; False if it takes one more transaction."""
    if _forget(txn, namespace):
        MARKS.put(txn, Mark(owner=owner, started=now()), namespace)
        return True
    return False


def end(meta: Environment, namespace: str) -> None:
    """Remove a mark and what was noted, unless somebody is collecting."""
    is_over = False
    while not is_over:
        with meta.write() as txn:
            is_over = bool(collector(meta.owners, txn, namespace)) or _forget(txn, namespace)


def end_dead(meta: Environment) -> None:
    """Remove the marks of those who died, so that no more is noted for them."""
    with meta.read() as txn:
        marked = list(MARKS.branches(txn))
        dead = [namespace for namespace in marked if not collector(meta.owners, txn, namespace)]
    for namespace in dead:
        end(meta, namespace)


def _forget(txn: Transaction, namespace: str) -> bool:
    MARKS.delete(txn, namespace)
    return TOUCHED.clear(txn, namespace, most=_SLICE)
