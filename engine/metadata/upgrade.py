"""Brings the records of an older format up to this one.

Sync. In one transaction: a crash leaves the one or the other.
"""

import msgspec

from engine.kv.environment import Environment
from engine.kv.schema import LEASE_ITEMS, LeaseItem
from engine.metadata import ledger
from engine.metadata.nodes import SNAPSHOT

__all__ = ["from_format_1"]


def from_format_1(meta: Environment) -> None:
    """Note who mentions what: format 1 only knew the children of a snapshot."""
    with meta.write() as txn:
        old = [
            (names[0], names[1], item)
            for names, item in LEASE_ITEMS.entries(txn)
            if isinstance(item, LeaseItem) and item.kind == "snapshot"
        ]
        for namespace, lease, item in old:
            LEASE_ITEMS.delete(txn, namespace, lease, item.kind, item.backend, item.key)
            new = msgspec.structs.replace(item, kind=SNAPSHOT)
            LEASE_ITEMS.put(txn, new, namespace, lease, SNAPSHOT, item.backend, item.key)
        ledger.rebuild(txn)
