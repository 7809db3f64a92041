"""What happened to a store of late, at a glance: whether a collection would find something.

Sync. Every process's transactions count: LMDB numbers them. What users deleted is counted in the same
transaction. What expires next is looked up anew only when something has changed.
"""

import msgspec

from engine import labels, times
from engine.kv.environment import Environment
from engine.kv.schema import IMAGES, LEASES, now
from engine.metadata import ledger

__all__ = ["Seen", "glance"]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a store, and when."""

    at: int
    transactions: int
    """How many there have been of any process, of any kind."""
    deletions: int
    """How many objects users have deleted."""
    expires: int | None
    """When the next lease or image expires."""
    is_pressed: bool = False
    """Whether a policy asks for images to be removed."""


def glance(meta: Environment, namespace: str, since: int, before: Seen | None = None) -> Seen:
    """Look at a store; of what expires only what does after `since`. `before` is the last look."""
    at, transactions = now(), meta.transactions()
    if before is not None and before.transactions == transactions:
        return msgspec.structs.replace(before, at=at)
    with meta.read() as txn:
        leases, images = LEASES.survey(txn, namespace)[0], IMAGES.survey(txn, namespace)[0]
        deletions = ledger.deletions(txn, namespace)
    labelled = (*(lease.labels for lease in leases), *(image.labels for image in images))
    moments = (times.moment(about.get(labels.GC_EXPIRE, "")) for about in labelled if about)
    expires = min((moment for moment in moments if moment is not None and moment > since), default=None)
    return Seen(at=at, transactions=transactions, deletions=deletions, expires=expires)
