"""Leases: what keeps objects that nothing else names yet.

Sync. A unit of work takes a lease before it begins; whatever it makes *or finds* joins the lease in
the same transaction, so that no collection can come between "it exists" and "it is mine". A lease
without expiry lives as long as its owner, the process that took it.
"""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError, FailedPrecondition
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import LEASE_ITEMS, LEASES, Lease, LeaseItem, now
from engine.processes import Owners

__all__ = ["CONTENT", "SNAPSHOT", "check", "drop", "is_live", "join", "leased"]

_log = logging.getLogger(__name__)

CONTENT = "content"
SNAPSHOT = "snapshot"


@contextmanager
def leased(meta: Environment, namespace: str) -> Iterator[str]:
    """Hold a lease of this process for the length of a block; give its ID."""
    lease = Lease(id=secrets.token_hex(8), created=now(), owner=meta.owners.me)
    with meta.write() as txn:
        LEASES.put(txn, lease, namespace, lease.id)
    try:
        yield lease.id
    finally:
        try:
            with meta.write() as txn:
                drop(txn, namespace, lease.id)
        except EngineError as error:  # what was done is done; the lease ends with this process
            _log.warning("lease %s stays for now: %s", lease.id, error)


def join(txn: Transaction, namespace: str, lease: str, item: LeaseItem) -> None:
    """Add an object to a lease; an empty lease ID means that the caller needs no pin."""
    if not lease:
        return
    check(txn, namespace, lease)
    LEASE_ITEMS.put(txn, item, namespace, lease, item.kind, item.backend, item.key)


def check(txn: Transaction, namespace: str, lease: str) -> None:
    """Raise FailedPrecondition if a lease has ended."""
    if lease and LEASES.get(txn, namespace, lease) is None:
        raise FailedPrecondition(f"lease {lease} has ended; start the operation again")


def drop(txn: Transaction, namespace: str, lease: str) -> None:
    """Remove a lease and its hold on its members."""
    LEASE_ITEMS.clear(txn, namespace, lease)
    LEASES.delete(txn, namespace, lease)


def is_live(owners: Owners, lease: Lease, at: int) -> bool:
    """Say whether a lease still holds at the time `at`."""
    if lease.expires is not None and lease.expires <= at:
        return False
    return lease.owner is None or owners.is_alive(lease.owner.id)
