"""A blob open to be read, anywhere in it.

Sync; safe from any thread. While it is open nobody deletes its bytes, in any process. No transaction
is open but while a view is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from engine.content import extents
from engine.content.holds import Holds, release
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, EXTENT, INLINE, SMALL, Blob
from engine.oci.digest import Digest

__all__ = ["Reader", "open_reader", "record_of"]


def record_of(txn: Transaction, namespace: str, digest: str) -> Blob:
    """Return a blob's record. Raises NotFound."""
    blob = BLOBS.get(txn, namespace, digest)
    if blob is None:
        raise NotFound(f"no blob {digest}")
    return blob


def open_reader(
    meta: Environment, blobs: Environment, holds: Holds, namespace: str, digest: Digest
) -> "Reader":
    """Open a blob. Raises NotFound."""
    while True:
        with meta.read() as txn:
            blob = record_of(txn, namespace, digest)
            small = SMALL.get(txn, blob.number) if blob.size <= INLINE else None
        if small is not None:
            return Reader(blob, blobs, data=small.data)
        hold = holds.take(blob.number)
        try:
            with meta.read() as txn:
                if record_of(txn, namespace, digest).number == blob.number:
                    return Reader(blob, blobs, hold)
        except BaseException:
            release(hold)
            raise
        release(hold)  # it went, and came back, between the look and the hold


class Reader:
    """The bytes of a blob; a context manager."""

    def __init__(
        self, blob: Blob, blobs: Environment, hold: int = -1, data: bytes | None = None
    ) -> None:
        """Read `blob` from `data` if it is given, else from its extents, which `hold` keeps."""
        self.blob = blob
        self._blobs = blobs
        self._hold = hold
        self.data = data
        self._is_open = True

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.blob.size

    @contextmanager
    def view(self, offset: int, size: int) -> Iterator[memoryview]:
        """Give up to `size` bytes at `offset` as they lie, without a copy; dead when the block ends.

        Fewer where an extent ends, none at the end. Keep the block short: pages that are freed
        meanwhile cannot be used again.
        """
        self._check(offset, size)
        size = min(size, self.size - offset)
        if size <= 0:
            with memoryview(b"") as nothing:
                yield nothing
        elif self.data is not None:
            with memoryview(self.data)[offset : offset + size] as piece:
                yield piece
        else:
            index, start = divmod(offset, EXTENT)
            with (
                extents.view(self._blobs, self.blob.number, index, self.size) as extent,
                extent[start : start + size] as piece,
            ):
                yield piece

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, fewer only at the end."""
        pieces: list[bytes] = []
        while size > 0:
            with self.view(offset, size) as piece:
                pieces.append(bytes(piece))
            if not pieces[-1]:
                break
            offset += len(pieces[-1])
            size -= len(pieces[-1])
        return b"".join(pieces)

    def pieces(self) -> Iterator[bytes]:
        """Yield all bytes in order, an extent at a time."""
        self._check(0, 0)
        if self.data is None:
            return extents.read(self._blobs, self.blob.number, self.size)
        return iter((self.data,) if self.data else ())

    def feed(self, take: Callable[[memoryview], object]) -> None:
        """Call `take` with all bytes in order, as they lie; it must not keep what it is given."""
        self._check(0, 0)
        if self.data is None:
            extents.feed(self._blobs, self.blob.number, self.size, take)
        else:
            take(memoryview(self.data))

    def _check(self, offset: int, size: int) -> None:
        if not self._is_open:
            raise FailedPrecondition(f"the reader of {self.blob.digest} is closed")
        if offset < 0 or size < 0:
            raise InvalidArgument("an offset and a size are not negative")

    def close(self) -> None:
        """Let go of the bytes; may be called again."""
        self._is_open = False
        hold, self._hold = self._hold, -1
        release(hold)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
