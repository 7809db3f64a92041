"""One blob on its way in: extents are durable as they fill, the blob exists at commit.

Sync; one thread at a time. Crash order: extents first, then one transaction that replaces the ingest
record by the blob record. A commit that fails on size or digest discards the ingest, so that a bad
download is not resumed for ever.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from engine import labels as label_rules
from engine.content import discard, extents
from engine.errors import DigestMismatch, FailedPrecondition, Refused
from engine.failpoints import hit
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, EXTENT, INGESTS, Blob, Ingest, now
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, Node, blob_node
from engine.oci.digest import Digest, hasher

__all__ = ["BATCH", "Writer"]

BATCH = 8 * EXTENT
"""The best size of one write, in bytes: one transaction, and no copy on the way."""


class Writer:
    """Writes an ingest. Closing without commit keeps what is durable for a later resume."""

    def __init__(
        self,
        meta: Environment,
        blobs: Environment,
        namespace: str,
        record: Ingest,
        closed: Callable[[str], None],
    ) -> None:
        self._meta = meta
        self._blobs = blobs
        self._namespace = namespace
        self._record = record
        self._on_close = closed
        self._expected = Digest(record.expected) if record.expected else None
        self._hash = hasher(self._expected)
        self._tail = bytearray()
        self._index = 0
        self._is_open = True
        self._resume()

    def _resume(self) -> None:
        whole = extents.stored_bytes(self._blobs, self._record.number) // EXTENT * EXTENT
        for extent in extents.read(self._blobs, self._record.number, whole):
            self._hash.update(extent)
            self._index += 1

    @property
    def ref(self) -> str:
        """The reference that this ingest is open under."""
        return self._record.ref

    @property
    def offset(self) -> int:
        """How many bytes have been written, those of an earlier writer among them."""
        return self._index * EXTENT + len(self._tail)

    @property
    def digest(self) -> Digest:
        """The digest of the bytes written so far."""
        return Digest(f"{self._hash.name}:{self._hash.hexdigest()}")

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. Refused once the blob is longer than announced."""
        self._check_open()
        total = self._record.total
        if total is not None and self.offset + len(data) > total:
            self.abort()
            raise Refused(f"{self.ref} is longer than the {total} bytes announced for it")
        self._hash.update(data)
        view = memoryview(data)
        if self._tail:
            room = EXTENT - len(self._tail)
            self._tail += view[:room]
            view = view[room:]
            if len(self._tail) < EXTENT:
                return
            self._store(memoryview(bytes(self._tail)))
            self._tail.clear()
        whole = len(view) // EXTENT * EXTENT
        for start in range(0, whole, BATCH):
            self._store(view[start : min(start + BATCH, whole)])
        self._tail += view[whole:]

    def _store(self, data: memoryview) -> None:
        self._index = extents.append(self._blobs, self._record.number, self._index, data)
        hit("content.ingest.written")

    def commit(self, labels: Labels | None = None) -> Blob:
        """Make the bytes a blob and return its record; that of an earlier equal one if there is.

        Raises DigestMismatch or Refused, and drops the ingest, when digest or size are not as
        announced, and FailedPrecondition when the ingest was aborted meanwhile.
        """
        self._check_open()
        label_rules.check(labels or {})
        size, digest = self.offset, self.digest
        if self._record.total is not None and size != self._record.total:
            self.abort()
            raise Refused(f"{self.ref} has {size} bytes, not the {self._record.total} announced")
        if self._expected and digest != self._expected:
            self.abort()
            raise DigestMismatch(self.ref, self._expected, digest)
        if self._tail:
            extents.append(self._blobs, self._record.number, self._index, memoryview(self._tail))
        hit("content.commit.before")
        blob = self._publish(digest, size, labels or {})
        if blob.number != self._record.number:
            self._delete_bytes()
        hit("content.commit.after")
        self.close()
        return blob

    def _publish(self, digest: Digest, size: int, labels: Labels) -> Blob:
        with self._meta.write() as txn:
            if self._is_ours(txn):
                return self._replace(txn, digest, size, labels)
            # The bytes may be deleted already: a record of them would name nothing.
            discard.drop_bytes(txn, self._record.number)
        self._delete_bytes()
        self.close()
        raise FailedPrecondition(f"ingest {self.ref} was aborted; start it again")

    def _is_ours(self, txn: Transaction) -> bool:
        ingest = INGESTS.get(txn, self._namespace, self.ref)
        return ingest is not None and ingest.number == self._record.number

    def _replace(self, txn: Transaction, digest: Digest, size: int, labels: Labels) -> Blob:
        """Replace the ingest by a blob, or give its labels to an equal one that came first."""
        at = now()
        blob = BLOBS.get(txn, self._namespace, digest)
        made = blob is None
        if blob is None:
            blob = Blob(
                digest=digest,
                number=self._record.number,
                size=size,
                created=at,
                updated=at,
                labels=dict(labels),
            )
            ingest = Node(INGEST, "", self.ref)
            ledger.drop(txn, self._namespace, ingest)
            ledger.unpin(txn, self._namespace, self._record.lease, ingest)
        else:
            merged = label_rules.merge(blob.labels, labels)
            blob = msgspec.structs.replace(blob, labels=merged, updated=at)
            discard.drop_ingest(txn, self._namespace, self.ref)
        ledger.put(txn, self._namespace, blob)
        ledger.pin(txn, self._namespace, self._record.lease, blob_node(digest), made=made)
        return blob

    def abort(self) -> None:
        """Drop the ingest and its bytes, unless someone did and it is another's by now."""
        with self._meta.write() as txn:
            if self._is_ours(txn):
                discard.drop_ingest(txn, self._namespace, self.ref)
            else:  # what was written since it was dropped
                discard.drop_bytes(txn, self._record.number)
        self._delete_bytes()
        self.close()

    def _delete_bytes(self) -> None:
        discard.empty(self._meta, self._blobs, [self._record.number])

    def close(self) -> None:
        """Let go of the ingest; may be called again."""
        if self._is_open:
            self._is_open = False
            self._on_close(self.ref)

    def _check_open(self) -> None:
        if not self._is_open:
            raise FailedPrecondition(f"the writer of {self.ref} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
