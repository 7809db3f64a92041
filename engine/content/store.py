"""Blobs by digest: find, label, read, verify, delete, and open an ingest for a new one.

Sync; safe from any thread. A blob is visible once its bytes are durable and hash to its digest; an
ingest is not visible as a blob, nor a blob as an ingest.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import msgspec

from engine import labels as label_rules
from engine.content import discard
from engine.content.holds import Holds
from engine.content.ingests import Ingests, Status
from engine.content.reader import Reader, open_reader, record_of
from engine.content.writer import Writer
from engine.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    Refused,
    printable,
)
from engine.fieldpaths import change_labels
from engine.filters import Fields, Filter, fields, matches
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, INLINE, SMALL, Blob, now
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.digests import full_name
from engine.metadata.nodes import blob_node
from engine.oci.digest import Digest, hasher
from engine.oci.short import LENGTHS, beginnings
from engine.progress import Report, silent

__all__ = ["ContentStore", "blob_fields"]


def blob_fields(blob: Blob) -> Fields:
    """Return how filters see a blob."""
    return fields({"digest": blob.digest}, blob.labels)


class ContentStore:
    """The blobs of one namespace."""

    def __init__(self, meta: Environment, blobs: Environment, namespace: str) -> None:
        self._meta = meta
        self._blobs = blobs
        self._holds = Holds(blobs.path.parent / "readers")
        self._ingests = Ingests(meta, blobs, self._holds, namespace)
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
        return record_of(txn, self._namespace, digest)

    def walk(self, filters: Sequence[Filter] = ()) -> Iterator[Blob]:
        """Yield the records of all blobs that match and can be read, by digest.

        Others may write meanwhile: what was there all the time is among them.
        """
        for blob in BLOBS.walk(self._meta, self._namespace):
            if isinstance(blob, Blob) and matches(filters, blob_fields(blob)):
                yield blob

    def damaged(self) -> list[Damaged]:
        """Return the digests whose records cannot be read."""
        found = BLOBS.walk(self._meta, self._namespace)
        return [record for record in found if isinstance(record, Damaged)]

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
        return self._relabel(txn, blob, label_rules.merge(blob.labels, labels))

    def _relabel(self, txn: Transaction, blob: Blob, labels: dict[str, str]) -> Blob:
        blob = msgspec.structs.replace(blob, labels=labels, updated=now())
        ledger.put(txn, self._namespace, blob)
        return blob

    def update_fields(self, digest: Digest, labels: Labels, paths: Sequence[str] = ()) -> Blob:
        """Make a blob's labels these, or those of them that field paths name (`change_labels`)."""
        with self._meta.write() as txn:
            blob = self._get(txn, digest)
            return self._relabel(txn, blob, change_labels(blob.labels, labels, paths))

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
        discard.empty(self._meta, self._blobs, self._holds, only, until=until, report=report)

    def open(self, digest: Digest) -> Reader:
        """Open a blob to be read, whoever deletes it meanwhile. Raises NotFound."""
        return open_reader(self._meta, self._blobs, self._holds, self._namespace, digest)

    def read(self, digest: Digest) -> Iterator[bytes]:
        """Yield a blob's bytes in order, whoever deletes it meanwhile. Raises NotFound."""
        self.info(digest)
        return self._read(digest)

    def _read(self, digest: Digest) -> Iterator[bytes]:
        with self.open(digest) as reader:
            yield from reader.pieces()

    def small(self, blob: Blob) -> bytes:
        """Return the bytes of a blob that lie beside its record, nothing if they lie elsewhere."""
        with self._meta.read() as txn:
            found = SMALL.get(txn, blob.number) if blob.size <= INLINE else None
        return found.data if found else b""

    def head(self, digest: Digest, count: int) -> bytes:
        """Return the first `count` bytes of a blob, or all; nothing else of it is read. NotFound."""
        with self.open(digest) as reader:
            return reader.read_at(0, count)

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
        _check(digest, running.hexdigest())

    def verify(self, digest: Digest) -> int:
        """Hash a blob again and return its size; DataLoss if the bytes are not what they were."""
        running = hasher(digest)
        with self.open(digest) as reader:
            reader.feed(running.update)
        _check(digest, running.hexdigest())
        return reader.size

    def growth(self, size: int) -> int:
        """Return how much more of the disk `size` bytes would take: what was deleted left some free."""
        return max(0, size - self._blobs.unused())

    def ingest(
        self, ref: str, *, lease: str, expected: Digest | None = None, total: int | None = None
    ) -> Writer:
        """Open the ingest `ref`, where an earlier writer stopped if that was at the same blob.

        Raises AlreadyExists (and pins the blob) when `expected` is here already, BeingWritten when
        another writer has the ingest open.
        """
        return self._ingests.open(ref, lease, expected, total)

    def wait(self, ref: str) -> None:
        """Wait a moment for the writer of an ingest: until it is closed, if it is of this process."""
        self._ingests.wait(ref)

    def status(self, ref: str) -> Status:
        """Return how far an ingest is. Raises NotFound."""
        return self._ingests.status(ref)

    def statuses(self, filters: Sequence[Filter] = ()) -> list[Status]:
        """Return how far each ingest is that matches; a filter sees its `ref`."""
        return self._ingests.statuses(filters)

    def abort(self, ref: str) -> None:
        """Drop an ingest and its bytes. Raises NotFound."""
        self._ingests.abort(ref)

    def _pin(self, txn: Transaction, digest: str, lease: str) -> None:
        ledger.pin(txn, self._namespace, lease, blob_node(digest))


def _check(digest: Digest, found: str) -> None:
    if found != digest.partition(":")[2]:
        raise DataLoss(f"blob {digest} is damaged: remove its images, import them again")
