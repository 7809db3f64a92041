"""Checks the bytes of blobs: that they are all there and hash to their digests, and that none are more.

Sync. A blob that someone removes meanwhile is passed over. Bytes that no record has are looked at twice:
a record comes before its bytes, and no number is used again, so that what has none after them gets none.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial

from engine.content import discard, extents
from engine.content.store import ContentStore
from engine.errors import DataLoss, FailedPrecondition, NotFound, Refused
from engine.failpoints import hit
from engine.fsck.findings import Counts, Finding, Trouble, What
from engine.kv.environment import Transaction
from engine.kv.schema import BLOBS, INGESTS, SMALL, TRASH, Blob
from engine.metadata import ledger
from engine.metadata.nodes import IMAGE, Node, blob_node
from engine.oci.digest import hasher, parse_digest
from engine.oci.reference import familiar
from engine.root import Root

__all__ = ["check_blobs", "orphaned_bytes"]

_HOLDERS = 10_000  # looked through for the images that need a blob


def check_blobs(
    root: Root,
    counts: Counts,
    passed: Callable[[int], None],
    broken: set[int],
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[Trouble]:
    """Hash the blobs of all namespaces, or `only` those: namespaces and digests.

    `passed` is told of bytes as they are read, `broken` gets the numbers of those that are not right.
    """
    seen: set[int] = set()
    for batch in BLOBS.batches(root.meta):
        for (namespace, *_), blob in batch:
            is_wanted = only is None or (namespace, blob.digest) in only
            if not is_wanted or blob.number in seen:  # another namespace's share of the same bytes
                continue
            seen.add(blob.number)
            wrong = _wrong_with(root, namespace, blob, passed)
            counts.blobs += 1
            counts.blob_bytes += blob.size
            if wrong:
                broken.add(blob.number)
                yield _broken(root, namespace, blob, wrong)


def _wrong_with(
    root: Root, namespace: str, blob: Blob, passed: Callable[[int], None] = lambda _size: None
) -> str:
    """Return what is wrong with these bytes of a blob, "" if nothing is, or they are gone by now."""
    content = ContentStore(root.meta, root.blobs, namespace)
    try:
        digest = parse_digest(blob.digest)
        running = hasher(digest)
        stored = len(content.small(blob)) or extents.stored_bytes(root.blobs, blob.number)
        with content.open(digest) as reader:
            if reader.blob.number != blob.number:
                return ""
            for piece in reader.pieces():
                running.update(piece)
                passed(len(piece))
    except NotFound:
        return ""
    except Refused as error:
        return str(error)
    except DataLoss:
        return "bytes of it are missing"
    if running.hexdigest() != digest.partition(":")[2]:
        return "its bytes are others"
    return f"it has {stored} bytes, not {blob.size}" if stored != blob.size else ""


def _broken(root: Root, namespace: str, blob: Blob, wrong: str) -> Trouble:
    with root.meta.read() as txn:
        holders = _holders(txn, namespace, blob)
    names = sorted({name for space in holders for name in _images(root, space, blob.digest)})
    detail = f"{wrong}; images that need it: {', '.join(names) or 'none'}"
    finding = Finding(what=What.BLOB, name=blob.digest, namespace=namespace, detail=detail)
    return Trouble(finding, partial(_drop, root, namespace, blob))


def _holders(txn: Transaction, namespace: str, blob: Blob) -> set[str]:
    """Return the namespaces that share these bytes: others may have the blob with bytes of their own."""
    held = ledger.holdings(txn, blob.digest)
    return {namespace, *(one.namespace for one in held if one.number == blob.number)}


def _images(root: Root, namespace: str, digest: str) -> Iterator[str]:
    """Yield the images that need a blob, in familiar form."""
    with root.meta.read() as txn:
        pending, seen = [blob_node(digest)], set[Node]()
        while pending and len(seen) < _HOLDERS:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.kind == IMAGE:
                yield familiar(node.key)
            pending += [mention.node for mention in ledger.mentioners(txn, namespace, node)]


def _drop(root: Root, namespace: str, blob: Blob) -> str:
    """Drop a broken blob, so that the next import or pull brings it again."""
    if not _wrong_with(root, namespace, blob):
        raise FailedPrecondition("it is gone, or was right when it was read again; check once more")
    with root.meta.write() as txn:
        for holder in _holders(txn, namespace, blob):
            found = BLOBS.get(txn, holder, blob.digest)
            if found is not None and found.number == blob.number:
                discard.drop_blob(txn, holder, blob.digest)
    hit("fsck.blob.dropped")
    ContentStore(root.meta, root.blobs, "").cleanup([blob.number])
    return "dropped; import or pull its images again"


# -- bytes that no record has -------------------------------------------------------------------


def orphaned_bytes(root: Root, known: Collection[int]) -> Iterator[Trouble]:
    """Yield runs of extents that belong to no blob; `known` are the numbers that had one before."""
    with root.meta.read() as txn:
        suspects = {number for number in SMALL.numbers(txn) if number not in known}
    suspects.update(number for number in extents.numbers(root.blobs) if number not in known)
    named = _named(root) if suspects else set()
    for number in sorted(suspects):
        if number not in named and (size := _stored(root, number)):
            detail = f"{size} bytes that no record has"
            finding = Finding(what=What.EXTENTS, name=str(number), detail=detail)
            yield Trouble(finding, partial(_remove, root, number))


def _stored(root: Root, number: int) -> int:
    """Return how many bytes there are under a number, in either place."""
    with root.meta.read() as txn:
        try:
            small = SMALL.get(txn, number)
        except DataLoss:
            return 1
    return len(small.data) if small else extents.stored_bytes(root.blobs, number)


def _named(root: Root) -> set[int]:
    """Return the numbers that records have by now."""
    named: set[int] = set()
    with root.meta.read() as txn:
        for table in (BLOBS, INGESTS, TRASH):
            named.update(record.number for record in table.survey(txn)[0])
    return named


def _remove(root: Root, number: int) -> str:
    with root.meta.write() as txn:
        SMALL.delete(txn, number)
    for _ in extents.drop(root.blobs, [number]):
        pass
    hit("fsck.extents.removed")
    return "removed"
