"""One blob on its way in: extents are durable as they fill, the blob exists at commit.

Sync; one thread at a time. Crash order: extents first, then one transaction that replaces the ingest
record by the blob record. A blob that is announced to be small has neither extents nor an ingest
record, unless its writer is closed before it is committed: its bytes come with its record. One that
another namespace shares with this one is complete as it is opened, and has no bytes of its own. A commit
that fails on size or digest discards the ingest, so that a bad download is not resumed for ever.
A writer holds its bytes (`engine.content.holds`): if someone drops the ingest they stay in trash until
it lets go, with what it wrote meanwhile.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self

import msgspec

from engine import labels as label_rules
from engine.content import discard
from engine.content.growing import Growing
from engine.content.holds import Holds, release
from engine.content.lasting import keep_record, lasting
from engine.content.reader import Reader
from engine.content.sharing import share
from engine.errors import (
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    Refused,
    Unavailable,
)
from engine.failpoints import hit
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import (
    BLOBS,
    COUNTERS,
    INGESTS,
    INLINE,
    SMALL,
    Blob,
    Ingest,
    Small,
    now,
)
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, Node, blob_node
from engine.oci.digest import Digest
from engine.processes import Owner

__all__ = ["Writer"]


class _Aborted(FailedPrecondition):
    """Someone dropped the ingest meanwhile: its bytes may be deleted already."""


class Writer:
    """Writes an ingest. Closing without commit keeps what was written for a later resume."""

    def __init__(
        self,
        meta: Environment,
        blobs: Environment,
        holds: Holds,
        namespace: str,
        record: Ingest,
        closed: Callable[[str], None],
        borrowed: Reader | None = None,
    ) -> None:
        """Go on with an ingest; one of number 0 has no record yet, nor bytes if they are `borrowed`."""
        self._meta = meta
        self._blobs = blobs
        self._holds = holds
        self._namespace = namespace
        self._record = record
        self._on_close = closed
        self._borrowed = borrowed
        self._is_open = True
        self._held = ExitStack()
        self._begin()
        if record.number:
            try:
                self._hold()
                self._bytes.resume(record.number)
            except BaseException:
                self._free()
                self._held.close()
                raise

    def _begin(self) -> None:
        self._expected = Digest(self._record.expected) if self._record.expected else None
        self._bytes = Growing(self._blobs, self._expected)

    @property
    def ref(self) -> str:
        """The reference that this ingest is open under."""
        return self._record.ref

    @property
    def offset(self) -> int:
        """How many bytes have been written, those of an earlier writer among them."""
        if self._borrowed:
            return self._borrowed.size
        return self._bytes.size

    @property
    def durable(self) -> tuple[int, int]:
        """The number under which bytes are durable, 0 as long as there are none, and how many are."""
        return self._record.number if self._bytes.durable else 0, self._bytes.durable

    @property
    def digest(self) -> Digest:
        """The digest of the bytes written so far."""
        if self._borrowed:
            return Digest(self._borrowed.blob.digest)
        return self._bytes.digest

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. Refused once the blob is longer than announced.

        A write that fails closes the writer: what is durable is there for the next one.
        """
        self._check_open()
        if isinstance(data, memoryview) and not (data.c_contiguous and data.ndim == data.itemsize == 1):
            data = data.tobytes()
        total = self._record.total
        if total is not None and self.offset + len(data) > total:
            self.abort()
            raise Refused(f"{self.ref} is longer than the {total} bytes announced for it")
        with self._leaving():
            if self._borrowed and len(data):
                self._unshare()
            self._bytes.write(self._record.number, data)

    def _unshare(self) -> None:
        """Have bytes of our own: a copy of those that are shared."""
        assert self._borrowed
        with self._borrowed as borrowed:
            self._borrowed = None
            self._own()
            for piece in borrowed.pieces():
                self.write(piece)

    def _own(self) -> None:
        total = self._record.total
        if (total is None or total > INLINE) and not self._settle():
            raise Unavailable(f"another process is writing {self.ref}")

    def truncate(self, size: int = 0) -> None:
        """Begin again at nothing. InvalidArgument for any other size."""
        self._check_open()
        if size:
            raise InvalidArgument("an ingest can only be cut to nothing, not to some of its bytes")
        with self._leaving():
            if self._borrowed:
                self._borrowed.close()
                self._borrowed = None
                self._own()
            if self._bytes.durable:
                self._leave_bytes()
            self._begin()

    def _leave_bytes(self) -> None:
        """Go on under another number, so that no byte of before can be met again."""
        old = self._record.number
        try:
            with self._meta.write() as txn:
                self._check_ours(txn)
                new = self._renumbered(txn)
                discard.drop_bytes(txn, old)
        except _Aborted:
            self.abort()
            raise
        self._record = new
        self._delete_bytes(old)
        self._hold()

    def commit(
        self, labels: Labels | None = None, *, size: int | None = None, expected: Digest | None = None
    ) -> Blob:
        """Make the bytes a blob and return its record; that of an earlier equal one if there is.

        The writer is closed then, whatever comes of it. Raises DigestMismatch or Refused, and drops
        the ingest, when digest or size are not as announced at the beginning or here, and
        FailedPrecondition when the ingest was aborted meanwhile.
        """
        self._check_open()
        with self._closing():
            label_rules.check(labels or {})
            self._check_size(self._record.total)
            self._check_size(size)
            self._check_digest(self._expected)
            self._check_digest(expected)
            if not self._borrowed and not self._is_small:
                self._bytes.store_tail(self._record.number)
            hit("content.commit.before")
            try:
                blob = self._publish(expected or self.digest, labels or {})
            except _Aborted:
                self._drop()
                raise
            hit("content.commit.after")
            return blob

    @property
    def _is_small(self) -> bool:
        return not self._bytes.durable and self.offset <= INLINE

    def _check_size(self, size: int | None) -> None:
        if size is not None and size != self.offset:
            self.abort()
            raise Refused(f"{self.ref} has {self.offset} bytes, not the {size} announced")

    def _check_digest(self, expected: Digest | None) -> None:
        if expected is None:
            return
        is_at_hand = expected.partition(":")[0] == self._bytes.algorithm
        actual = self.digest if is_at_hand else self._digest_as(expected)
        if actual != expected:
            self.abort()
            raise DigestMismatch(self.ref, expected, actual)

    def _digest_as(self, expected: Digest) -> Digest:
        """Hash all bytes again, with another algorithm than was announced."""
        if self._borrowed:
            self._unshare()
        return self._bytes.digest_as(self._record.number, expected)

    def _publish(self, digest: Digest, labels: Labels) -> Blob:
        """Replace the ingest by a blob, or give its labels to an equal one that came first."""
        at = now()
        with self._meta.write() as txn:
            self._check_ours(txn)
            blob = BLOBS.get(txn, self._namespace, digest)
            is_new = blob is None
            if blob is None:
                number = self._make(txn)
                blob = Blob(digest=digest, number=number, size=self.offset, created=at, updated=at)
            elif self._record.number:
                discard.drop_ingest(txn, self._namespace, self.ref)
            merged = label_rules.merge(blob.labels, labels)
            blob = msgspec.structs.replace(blob, labels=merged, updated=at)
            ledger.put(txn, self._namespace, blob)
            ledger.pin(txn, self._namespace, self._record.lease, blob_node(digest), made=is_new)
        if self._record.number not in {0, blob.number}:
            self._delete_bytes(self._record.number)
        return blob

    def _make(self, txn: Transaction) -> int:
        """Make the bytes those of a blob, not of an ingest any more; return their number."""
        if self._borrowed:
            return share(txn, self._borrowed)
        if self._record.number:
            ingest = Node(INGEST, "", self.ref)
            ledger.drop(txn, self._namespace, ingest)
            ledger.unpin(txn, self._namespace, self._record.lease, ingest)
        number = self._record.number or COUNTERS.next(txn, "blob")
        if self._is_small:
            SMALL.put(txn, Small(data=self._bytes.tail), number)
        return number

    def _check_ours(self, txn: Transaction) -> None:
        if self._record.number and not self._is_ours(txn):
            raise _Aborted(f"ingest {self.ref} was aborted; start it again")

    def _is_ours(self, txn: Transaction) -> bool:
        ingest = INGESTS.get(txn, self._namespace, self.ref)
        return ingest is not None and ingest.number == self._record.number

    def abort(self) -> None:
        """Drop the ingest and its bytes, unless someone did and it is another's by now."""
        with self._closing():
            if self._record.number:
                self._drop()

    def _drop(self) -> None:
        with self._meta.write() as txn:
            if self._is_ours(txn):
                discard.drop_ingest(txn, self._namespace, self.ref)
            else:  # what was written since it was dropped
                discard.drop_bytes(txn, self._record.number)
        self._delete_bytes(self._record.number)

    def _delete_bytes(self, number: int) -> None:
        self._held.close()
        discard.empty(self._meta, self._blobs, self._holds, [number])

    def close(self) -> None:
        """Let go of the ingest, and keep what was written for a later resume; may be called again."""
        if not self._is_open:
            return
        with self._closing():
            if not self._borrowed and (self._record.number or self.offset):
                self._keep()

    def _keep(self) -> None:
        if not self._record.number and not self._settle():
            return
        self._bytes.store_tail(self._record.number)
        if not self._rest():
            self._drop()

    def _rest(self) -> bool:
        """Say in the record that nobody writes; False if it is not ours, or gone."""
        with self._meta.write() as txn:
            is_ours = self._is_ours(txn)
            if is_ours:
                idle = msgspec.structs.replace(self._record, owner=Owner())
                ledger.put(txn, self._namespace, lasting(idle))
        return is_ours

    def _settle(self) -> bool:
        """Make a record of what is to be resumed, unless another process has one; say whether."""
        with self._meta.write() as txn:
            if INGESTS.get(txn, self._namespace, self.ref):
                return False
            record = self._renumbered(txn)
        self._record = record
        self._hold()
        return True

    def _renumbered(self, txn: Transaction) -> Ingest:
        record = msgspec.structs.replace(self._record, number=COUNTERS.next(txn, "blob"))
        return keep_record(txn, self._namespace, record)

    def _hold(self) -> None:
        """Hold the bytes, and look then: they may have been dropped, and deleted, before."""
        self._held.callback(release, self._holds.take(self._record.number))
        with self._meta.read() as txn:
            self._check_ours(txn)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        with self._leaving():
            yield
        self._let_go()

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """Let go after a failure, of what is durable too: this process may live long."""
        try:
            if self._is_open:
                self._free()
        finally:
            self._let_go()

    def _free(self) -> None:
        if self._record.number:
            with suppress(EngineError):  # else it is free when this process ends
                self._rest()

    def _let_go(self) -> None:
        if self._is_open:
            self._is_open = False
            self._held.close()
            if self._borrowed:
                self._borrowed.close()
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
        try:
            self.close()
        except EngineError:
            if error is None:  # else that is what is to be told
                raise
