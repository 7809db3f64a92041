"""Blobs by digest: find, label, read, verify, delete, and open an ingest for a new one.

Sync; safe from any thread. A blob is visible once its bytes are durable and hash to its digest; an
ingest is not visible as a blob, nor a blob as an ingest.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine import labels as label_rules
from engine import processes
from engine.content import discard, extents
from engine.content.writer import Writer
from engine.errors import AlreadyExists, DataLoss, NotFound, Refused, Unavailable
from engine.failpoints import hit
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, COUNTERS, INGESTS, Blob, Ingest, LeaseItem, now
from engine.labels import Labels
from engine.metadata import leases
from engine.oci.digest import Digest, hasher

__all__ = ["ContentStore", "Status"]


@dataclass(frozen=True, slots=True)
class Status:
    """An ingest: its reference, the bytes that are durable, and what is expected of it."""

    ref: str
    offset: int
    total: int | None
    expected: str | None
    started: int


class ContentStore:
    """The blobs of one namespace."""

    def __init__(self, meta: Environment, blobs: Environment, namespace: str) -> None:
        self._meta = meta
        self._blobs = blobs
        self._namespace = namespace
        self._writing: set[str] = set()  # refs with a writer in this process
        self._lock = threading.Lock()

    def info(self, digest: Digest, *, lease: str = "") -> Blob:
        """Return a blob's record; with a lease, pin it in the same step. Raises NotFound."""
        with self._meta.write() if lease else self._meta.read() as txn:
            blob = BLOBS.get(txn, self._namespace, digest)
            if blob is None:
                raise NotFound(f"no blob {digest}")
            self._pin(txn, digest, lease)
            return blob

    def walk(self) -> list[Blob]:
        """Return the records of all blobs."""
        with self._meta.read() as txn:
            return BLOBS.scan(txn, self._namespace)

    def update(self, digest: Digest, labels: Labels) -> Blob:
        """Set labels on a blob, deleting those whose new value is empty. Raises NotFound."""
        with self._meta.write() as txn:
            blob = BLOBS.get(txn, self._namespace, digest)
            if blob is None:
                raise NotFound(f"no blob {digest}")
            merged = label_rules.merge(blob.labels, labels)
            blob = msgspec.structs.replace(blob, labels=merged, updated=now())
            BLOBS.put(txn, blob, self._namespace, digest)
            return blob

    def delete(self, digest: Digest) -> None:
        """Make a blob unreachable; `cleanup` deletes its bytes. Raises NotFound."""
        with self._meta.write() as txn:
            if not discard.drop_blob(txn, self._namespace, digest):
                raise NotFound(f"no blob {digest}")

    def cleanup(self) -> None:
        """Delete the bytes of blobs and ingests that were dropped."""
        discard.empty(self._meta, self._blobs)

    def read(self, digest: Digest) -> Iterator[bytes | memoryview]:
        """Yield a blob's bytes in order; each piece is dead once the next is asked for."""
        blob = self.info(digest)
        return extents.read(self._blobs, blob.number, blob.size)

    def read_all(self, digest: Digest, limit: int) -> bytes:
        """Return a small blob whole and verified. Raises Refused over `limit` bytes."""
        if self.info(digest).size > limit:
            raise Refused(f"blob {digest} is over {limit} bytes, too large for its kind")
        return b"".join(self.read_verified(digest))

    def read_verified(self, digest: Digest) -> Iterator[bytes]:
        """Yield copies of a blob's pieces; DataLoss at the end if they are not what they were."""
        running = hasher(digest)
        for extent in self.read(digest):
            piece = bytes(extent)
            running.update(piece)
            yield piece
        if running.hexdigest() != digest.partition(":")[2]:
            raise DataLoss(f"blob {digest} is damaged: remove its images, import them again")

    def verify(self, digest: Digest) -> int:
        """Hash a blob again and return its size; DataLoss if the bytes are not what they were."""
        return sum(map(len, self.read_verified(digest)))

    def ingest(
        self, ref: str, *, lease: str, expected: Digest | None = None, total: int | None = None
    ) -> Writer:
        """Open the ingest `ref`, where it stopped if an earlier writer died, and return its writer.

        Raises AlreadyExists (and pins the blob) when `expected` is here already, Unavailable when
        another writer has the ingest open.
        """
        with self._lock:
            if ref in self._writing:
                raise Unavailable(f"ingest {ref} is being written")
            with self._meta.write() as txn:
                found = bool(expected and BLOBS.get(txn, self._namespace, expected))
                if found:
                    self._pin(txn, str(expected), lease)
                else:
                    record = self._begin(txn, ref, lease, expected, total)
            if found:
                raise AlreadyExists(f"blob {expected} is in the store")
            self._writing.add(ref)
        try:
            hit("content.ingest.begun")
            return Writer(self._meta, self._blobs, self._namespace, record, closed=self._closed)
        except BaseException:
            self._closed(ref)
            raise

    def _begin(
        self,
        txn: Transaction,
        ref: str,
        lease: str,
        expected: Digest | None,
        total: int | None,
    ) -> Ingest:
        me = processes.myself()
        old = INGESTS.get(txn, self._namespace, ref)
        if old and old.owner != me and processes.is_alive(old.owner):
            raise Unavailable(f"ingest {ref} is being written by process {old.owner.pid}")
        if old and (old.expected, old.total) == (expected, total):
            record = msgspec.structs.replace(old, owner=me, lease=lease)
        else:
            discard.drop_ingest(txn, self._namespace, ref)
            record = Ingest(
                ref=ref,
                number=COUNTERS.next(txn, "blob"),
                total=total,
                expected=expected,
                owner=me,
                lease=lease,
                started=now(),
            )
        INGESTS.put(txn, record, self._namespace, ref)
        return record

    def _closed(self, ref: str) -> None:
        with self._lock:
            self._writing.discard(ref)

    def statuses(self) -> list[Status]:
        """Return how far each ingest is."""
        with self._meta.read() as txn:
            records = INGESTS.scan(txn, self._namespace)
        return [
            Status(
                ref=record.ref,
                offset=extents.stored_bytes(self._blobs, record.number),
                total=record.total,
                expected=record.expected,
                started=record.started,
            )
            for record in records
        ]

    def abort(self, ref: str) -> None:
        """Drop an ingest and its bytes. Raises NotFound."""
        with self._meta.write() as txn:
            if not discard.drop_ingest(txn, self._namespace, ref):
                raise NotFound(f"no ingest {ref}")

    def _pin(self, txn: Transaction, digest: str, lease: str) -> None:
        item = LeaseItem(kind=leases.CONTENT, backend="", key=digest)
        leases.join(txn, self._namespace, lease, item)
