"""Dropping blobs and ingests: the record now, the bytes later.

Sync. The record goes and a Trash record comes in the caller's transaction; `empty` deletes bytes
afterwards, in any process, as often as it is called. A blob number is never used twice, so what is
deleted late can only be dead. Small bytes go with their record: readers have copies of them.
"""

import math
from collections.abc import Collection

from engine.content import extents
from engine.content.holds import Holds
from engine.failpoints import hit
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import SMALL, TRASH, Blob, Ingest, Trash
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, Node, blob_node
from engine.progress import Report, Step, silent

__all__ = ["drop_blob", "drop_bytes", "drop_ingest", "empty", "revive"]

_KIND = "blob"


def drop_bytes(txn: Transaction, number: int) -> None:
    """Drop bytes that no record names."""
    if not SMALL.delete(txn, number):
        TRASH.put(txn, Trash(kind=_KIND, backend="", number=number), _KIND, "", number)


def revive(txn: Transaction, number: int) -> None:
    """Take dropped bytes back, which a reader holds and which have a record again."""
    TRASH.delete(txn, _KIND, "", number)


def drop_blob(txn: Transaction, namespace: str, digest: str) -> Blob | None:
    """Drop a blob and return its record, None if there was none to read.

    The bytes stay while another namespace has them.
    """
    blob = ledger.drop(txn, namespace, blob_node(digest))
    if not isinstance(blob, Blob):
        return None
    if not ledger.is_elsewhere(txn, namespace, blob):
        drop_bytes(txn, blob.number)
    return blob


def drop_ingest(txn: Transaction, namespace: str, ref: str) -> int | None:
    """Drop an ingest; return the number of its bytes, None if there was none."""
    ingest = ledger.drop(txn, namespace, Node(INGEST, "", ref))
    if not isinstance(ingest, Ingest):
        return None
    ledger.unpin(txn, namespace, ingest.lease, Node(INGEST, "", ref))
    drop_bytes(txn, ingest.number)
    return ingest.number


def empty(
    meta: Environment,
    blobs: Environment,
    holds: Holds,
    only: Collection[int] | None = None,
    *,
    until: float = math.inf,
    report: Report = silent,
) -> None:
    """Delete the bytes of everything dropped so far, or of some numbers; what is left stays dropped.

    So does what someone reads. `until` is of the monotonic clock.
    """
    numbers = _deletable(meta, holds, only)
    done = 0
    for gone in extents.drop(blobs, numbers, until=until):
        hit("trash.emptied")
        with meta.write() as txn:
            for number in gone:
                TRASH.delete(txn, _KIND, "", number)
        done += len(gone)
        report(Step.SWEEP, "bytes", len(numbers), done)


def _deletable(meta: Environment, holds: Holds, only: Collection[int] | None) -> list[int]:
    """Return what is dropped and not held: in that order, as who holds it may take it back."""
    with meta.read() as txn:
        if only is None:
            only = [trash.number for trash in TRASH.survey(txn, _KIND)[0]]
    free = holds.free(only)
    with meta.read() as txn:
        return [number for number in free if TRASH.get(txn, _KIND, "", number)]
