"""One blob's bytes in several namespaces: who may have those of whom, and how.

Sync. Bytes are shared by their number, which each namespace's record of the blob has; the last of the
records to go drops them. An isolated namespace neither sees nor gives, but for what a namespace labelled
`containerd.io/namespace.shareable` gives to all.
"""

from engine import labels
from engine.content.discard import revive
from engine.content.holds import Holds
from engine.content.reader import Reader, open_reader
from engine.errors import NotFound
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import COUNTERS, NAMESPACES, SMALL, Small
from engine.metadata import ledger
from engine.oci.digest import Digest

__all__ = ["borrow", "share"]


def borrow(
    meta: Environment, blobs: Environment, holds: Holds, namespace: str, digest: Digest
) -> Reader | None:
    """Open a blob of another namespace that this one may share, None if there is none."""
    with meta.read() as txn:
        found = ledger.holdings(txn, digest)
        givers = [held.namespace for held in found if _gives(txn, held.namespace, namespace)]
    for giver in givers:
        try:
            return open_reader(meta, blobs, holds, giver, digest)
        except NotFound:
            continue  # removed meanwhile
    return None


def _gives(txn: Transaction, giver: str, taker: str) -> bool:
    if giver == taker:
        return False
    said = NAMESPACES.get(txn, giver)
    if said is not None and said.labels.get(labels.SHAREABLE) == "true":
        return True
    return not (said is not None and said.isolated) and not _is_isolated(txn, taker)


def _is_isolated(txn: Transaction, namespace: str) -> bool:
    said = NAMESPACES.get(txn, namespace)
    return said is not None and said.isolated


def share(txn: Transaction, borrowed: Reader) -> int:
    """Return a number for a new record of borrowed bytes, though the one they were of may be gone.

    They are there: a reader holds them.
    """
    number = borrowed.blob.number
    if any(held.number == number for held in ledger.holdings(txn, borrowed.blob.digest)):
        return number
    if borrowed.data is None:
        revive(txn, number)
        return number
    number = COUNTERS.next(txn, "blob")
    SMALL.put(txn, Small(data=borrowed.data), number)
    return number
