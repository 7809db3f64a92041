"""Blobs by digest: find, label, read, verify, delete, and open an ingest for a new one.

Sync; safe from any thread. A blob is visible once its bytes are durable and hash to its digest; an
ingest is not visible as a blob, nor a blob as an ingest.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import msgspec

from engine import labels as label_rules
from engine.content import discard, extents
from engine.content.writer import Writer
from engine.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    Refused,
    Unavailable,
    printable,
)
from engine.failpoints import hit
from engine.filters import Fields, fields
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, COUNTERS, INGESTS, Blob, Ingest, now
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.digests import full_name
from engine.metadata.nodes import INGEST, Node, blob_node
from engine.oci.digest import Digest, hasher
from engine.oci.short import LENGTHS, beginnings
from engine.progress import Report, silent

__all__ = ["BeingWritten", "ContentStore", "Status", "blob_fields"]


class BeingWritten(Unavailable):
    """Someone else has the ingest open, as the message says."""


@dataclass(frozen=True, slots=True)
class Status:
    """An ingest: its reference, the bytes that are durable, and what is expected of it."""

    ref: str
    offset: int
    total: int | None
    expected: str | None
    started: int


def blob_fields(blob: Blob) -> Fields:
    """Return how filters see a blob."""
    return fields({"digest": blob.digest}, blob.labels)


class ContentStore:
    """The blobs of one namespace."""

    def __init__(self, meta: Environment, blobs: Environment, namespace: str) -> None:
        self._meta = meta
        self._blobs = blobs
        self._namespace = namespace

    def info(self, digest: Digest, *, lease: str = "") -> Blob:
        """Return a blob's record; with a lease, pin it in the same step. Raises NotFound."""
        with self._meta.write() if lease else self._meta.read() as txn:
            return self._pinned(txn, digest, lease)

    def check_all(self, digests: Iterable[Digest]) -> None:
        """Raise NotFound unless all of these are here, DataLoss if that can't be told."""
        with self._meta.read() as txn:
            for digest in digests:
                self._get(txn, digest)

    def find(self, text: str) -> Digest:
        """Return the digest of the blob that `text` means: all of it, or the first digits.

        NotFound, InvalidArgument where it is no digest or begins several.
        """
        with self._meta.read() as txn:
            found = full_name(BLOBS, txn, self._namespace, text=text, name=lambda blob: blob.digest)
        if found is None and not beginnings(text):
            raise InvalidArgument(
                f"{printable(text)!r} is not a sha256 or sha512 digest, nor the first digits of one; "
                "`lamina content ls` lists them"
            )
        if found is None:
            raise NotFound(f"no blob {text}; `lamina content ls` lists them")
        return Digest(found)

    def beginning(self, text: str, most: int) -> list[str]:
        """Return digests of blobs that begin as `text`, in order, so many at most."""
        with self._meta.read() as txn:
            found = (
                BLOBS.beginning(txn, self._namespace, text=text, size=size, name=lambda b: b.digest)
                for size in LENGTHS
            )
            return list(islice(chain.from_iterable(found), most))

    def _get(self, txn: Transaction, digest: Digest) -> Blob:
        blob = BLOBS.get(txn, self._namespace, digest)
        if blob is None:
            raise NotFound(f"no blob {digest}")
        return blob

    def walk(self) -> list[Blob]:
        """Return the records of all blobs that can be read."""
        with self._meta.read() as txn:
            return BLOBS.survey(txn, self._namespace)[0]

    def damaged(self) -> list[Damaged]:
        """Return the digests whose records cannot be read."""
        with self._meta.read() as txn:
            return BLOBS.survey(txn, self._namespace)[1]

    def pin(self, digests: Sequence[Digest], lease: str) -> list[Blob]:
        """Pin blobs in one step and return their records. Raises NotFound, and pins none then."""
        with self._meta.write() as txn:
            return [self._pinned(txn, digest, lease) for digest in digests]

    def _pinned(self, txn: Transaction, digest: Digest, lease: str) -> Blob:
        blob = self._get(txn, digest)
        self._pin(txn, digest, lease)
        return blob

    def update(self, digest: Digest, labels: Labels) -> Blob:
        """Set labels on a blob, deleting those whose new value is empty. Raises NotFound."""
        return self.update_all({digest: labels})[0]

    def update_all(self, changes: Mapping[Digest, Labels]) -> list[Blob]:
        """Set labels on several blobs, all or none, as `update` does on one."""
        with self._meta.write() as txn:
            return [self._update(txn, digest, labels) for digest, labels in changes.items()]

    def _update(self, txn: Transaction, digest: Digest, labels: Labels) -> Blob:
        blob = self._get(txn, digest)
        merged = label_rules.merge(blob.labels, labels)
        blob = msgspec.structs.replace(blob, labels=merged, updated=now())
        ledger.put(txn, self._namespace, blob)
        return blob

    def delete(self, digest: Digest) -> None:
        """Make a blob unreachable; `cleanup` deletes its bytes. Raises NotFound."""
        with self._meta.write() as txn:
            if discard.drop_blob(txn, self._namespace, digest) is None:
                raise NotFound(f"no blob {digest}")

    def cleanup(
        self,
        only: Collection[int] | None = None,
        *,
        seconds: float = math.inf,
        report: Report = silent,
    ) -> None:
        """Delete the bytes of blobs and ingests that were dropped, or of some of those, by number.

        What `seconds` do not suffice for is left for the next time.
        """
        until = time.monotonic() + seconds
        discard.empty(self._meta, self._blobs, only, until=until, report=report)

    def read(self, digest: Digest) -> Iterator[bytes]:
        """Yield a blob's bytes in order. NotFound, also when it is removed meanwhile."""
        return self._read(self.info(digest))

    def _read(self, blob: Blob) -> Iterator[bytes]:
        with self._telling_removed(blob):
            yield from extents.read(self._blobs, blob.number, blob.size)

    def head(self, digest: Digest, count: int) -> bytes:
        """Return the first `count` bytes of a blob, or all; nothing else of it is read. NotFound."""
        blob = self.info(digest)
        with self._telling_removed(blob):
            return extents.head(self._blobs, blob.number, blob.size, count)

    @contextmanager
    def _telling_removed(self, blob: Blob) -> Iterator[None]:
        """Make a loss in the block NotFound if the blob is removed by then."""
        try:
            yield
        except DataLoss:
            with self._meta.read() as txn:
                found = BLOBS.get(txn, self._namespace, blob.digest)
            if found is None or found.number != blob.number:
                raise NotFound(f"blob {blob.digest} was removed while it was read") from None
            raise

    def read_all(self, digest: Digest, limit: int) -> bytes:
        """Return a small blob whole and verified. Raises Refused over `limit` bytes."""
        if self.info(digest).size > limit:
            raise Refused(f"blob {digest} is over {limit} bytes, too large for its kind")
        return b"".join(self.read_verified(digest))

    def read_verified(self, digest: Digest) -> Iterator[bytes]:
        """Yield a blob's pieces; DataLoss at the end if they are not what they were."""
        running = hasher(digest)
        for piece in self.read(digest):
            running.update(piece)
            yield piece
        if running.hexdigest() != digest.partition(":")[2]:
            raise DataLoss(f"blob {digest} is damaged: remove its images, import them again")

    def verify(self, digest: Digest) -> int:
        """Hash a blob again and return its size; DataLoss if the bytes are not what they were."""
        return sum(map(len, self.read_verified(digest)))

    def growth(self, size: int) -> int:
        """Return how much more of the disk `size` bytes would take: what was deleted left some free."""
        return max(0, size - self._blobs.unused())

    def ingest(
        self, ref: str, *, lease: str, expected: Digest | None = None, total: int | None = None
    ) -> Writer:
        """Open the ingest `ref`, where it stopped if an earlier writer died, and return its writer.

        Raises AlreadyExists (and pins the blob) when `expected` is here already, BeingWritten when
        another writer has the ingest open.
        """
        if not self._meta.owners.claim(self._namespace, ref):
            raise BeingWritten(f"this process is writing {expected or ref}")
        try:
            with self._meta.write() as txn:
                found = bool(expected and BLOBS.get(txn, self._namespace, expected))
                if found:
                    self._pin(txn, str(expected), lease)
                else:
                    record = self._begin(txn, ref, lease, expected, total)
            if found:
                raise AlreadyExists(f"blob {expected} is in the store")
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
        me = self._meta.owners.me
        old = INGESTS.get(txn, self._namespace, ref)
        if old and old.owner != me and self._meta.owners.is_alive(old.owner.id):
            raise BeingWritten(f"{old.owner} is writing {expected or ref}")
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
        ledger.put(txn, self._namespace, record)
        ledger.pin(txn, self._namespace, lease, Node(INGEST, "", ref), made=True)
        return record

    def _closed(self, ref: str) -> None:
        self._meta.owners.release(self._namespace, ref)

    def statuses(self) -> list[Status]:
        """Return how far each ingest is."""
        with self._meta.read() as txn:
            records = INGESTS.survey(txn, self._namespace)[0]
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
            if discard.drop_ingest(txn, self._namespace, ref) is None:
                raise NotFound(f"no ingest {ref}")

    def _pin(self, txn: Transaction, digest: str, lease: str) -> None:
        ledger.pin(txn, self._namespace, lease, blob_node(digest))
