"""Dropping blobs and ingests: the record now, the bytes later.

Sync. The record goes and a Trash record comes in the caller's transaction; `empty` deletes bytes
afterwards, in any process, as often as it is called. A blob number is never used twice, so what is
deleted late can only be dead.
"""

from engine.content import extents
from engine.failpoints import hit
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, INGESTS, TRASH, Trash

__all__ = ["drop_blob", "drop_bytes", "drop_ingest", "empty"]

_KIND = "blob"


def drop_bytes(txn: Transaction, number: int) -> None:
    """Drop bytes that no record names."""
    TRASH.put(txn, Trash(kind=_KIND, backend="", number=number), _KIND, "", number)


def drop_blob(txn: Transaction, namespace: str, digest: str) -> bool:
    """Drop a blob; say whether there was one."""
    blob = BLOBS.get(txn, namespace, digest)
    if blob is None:
        return False
    BLOBS.delete(txn, namespace, digest)
    drop_bytes(txn, blob.number)
    return True


def drop_ingest(txn: Transaction, namespace: str, ref: str) -> bool:
    """Drop an ingest; say whether there was one."""
    ingest = INGESTS.get(txn, namespace, ref)
    if ingest is None:
        return False
    INGESTS.delete(txn, namespace, ref)
    drop_bytes(txn, ingest.number)
    return True


def empty(meta: Environment, blobs: Environment) -> None:
    """Delete the bytes of everything dropped so far."""
    with meta.read() as txn:
        dropped = TRASH.survey(txn, _KIND)[0]
    for trash in dropped:
        extents.drop(blobs, trash.number)
        hit("trash.emptied")
        with meta.write() as txn:
            TRASH.delete(txn, _KIND, "", trash.number)
