"""How long an ingest lasts: as its lease does, without one for a while after its last writer. Sync."""

import msgspec

from engine import limits
from engine.kv.environment import Transaction
from engine.kv.schema import Ingest, now
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, Node

__all__ = ["keep_record", "lasting"]


def keep_record(txn: Transaction, namespace: str, record: Ingest) -> Ingest:
    """Write an ingest's record, for as long as its lease lives, without one for a while; return it."""
    record = lasting(record)
    ledger.put(txn, namespace, record)
    ledger.pin(txn, namespace, record.lease, Node(INGEST, "", record.ref), made=True)
    return record


def lasting(record: Ingest) -> Ingest:
    """Return a record that lasts from now on."""
    at = now()
    expires = 0 if record.lease else at + limits.INGEST_LIFE_S * 10**9
    return msgspec.structs.replace(record, updated=at, expires=expires)
