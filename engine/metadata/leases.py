"""Leases: what keeps objects that nothing else names yet.

Sync. A unit of work takes a lease before it begins; whatever it makes *or finds* joins the lease in
the same transaction, so that no collection can come between "it exists" and "it is mine". A lease
without expiry lives as long as its owner, the process that took it, or without one until it is removed.
"""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from engine import labels, times
from engine.errors import EngineError
from engine.kv.environment import Environment
from engine.kv.schema import Lease, now
from engine.metadata import ledger
from engine.metadata.nodes import LEASE, Node
from engine.processes import Owners

__all__ = ["is_live", "leased"]

_log = logging.getLogger(__name__)


@contextmanager
def leased(meta: Environment, namespace: str) -> Iterator[str]:
    """Hold a lease of this process for the length of a block; give its ID."""
    lease = Lease(id=secrets.token_hex(8), created=now(), owner=meta.owners.me)
    with meta.write() as txn:
        ledger.put(txn, namespace, lease)
    try:
        yield lease.id
    finally:
        try:
            with meta.write() as txn:
                ledger.drop(txn, namespace, Node(LEASE, "", lease.id))
        except EngineError as error:  # what was done is done; the lease ends with this process
            _log.warning("lease %s stays for now: %s", lease.id, error)


def is_live(owners: Owners, lease: Lease, at: int) -> bool:
    """Say whether a lease still holds at the time `at`. An expiry that cannot be read is none."""
    expires = times.moment(lease.labels.get(labels.GC_EXPIRE, ""))
    if expires is not None and expires <= at:
        return False
    return lease.owner is None or owners.is_alive(lease.owner.id)
