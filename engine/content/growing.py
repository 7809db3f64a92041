"""The bytes of a blob on their way in: hashed, and durable as they fill extents.

Sync; one thread at a time. They are written under the number that the writer has at the time: it is
another one only as long as nothing is durable, or after beginning anew.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.content import extents
from engine.failpoints import hit
from engine.kv.environment import Environment
from engine.kv.schema import EXTENT
from engine.oci.digest import Digest, hasher

__all__ = ["BATCH", "Growing"]

BATCH = 8 * EXTENT
"""The best size of one write, in bytes: one transaction, and no copy on the way."""


class Growing:
    """Bytes so far: whole extents, and a tail that fills the next."""

    def __init__(self, blobs: Environment, expected: Digest | None) -> None:
        """Begin at nothing, to be hashed as what is `expected`."""
        self._blobs = blobs
        self._hash = hasher(expected)
        self._tail = bytearray()
        self._index = 0
        self.durable = 0
        """How many bytes are durable."""

    def resume(self, number: int) -> None:
        """Go on after what is durable under a number."""
        self.durable = extents.stored_bytes(self._blobs, number)
        self._index, rest = divmod(self.durable, EXTENT)
        extents.feed(self._blobs, number, self.durable, self._hash.update)
        if rest:
            with extents.view(self._blobs, number, self._index, self.durable) as last:
                self._tail += last

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._index * EXTENT + len(self._tail)

    @property
    def tail(self) -> bytes:
        """The bytes after the last whole extent."""
        return bytes(self._tail)

    @property
    def algorithm(self) -> str:
        """What the digest is made with."""
        return self._hash.name

    @property
    def digest(self) -> Digest:
        """The digest of the bytes so far."""
        return Digest(f"{self._hash.name}:{self._hash.hexdigest()}")

    def digest_as(self, number: int, expected: Digest) -> Digest:
        """Hash all bytes again, with another algorithm than was announced."""
        again = hasher(expected)
        extents.feed(self._blobs, number, self._index * EXTENT, again.update)
        again.update(self._tail)
        return Digest(f"{again.name}:{again.hexdigest()}")

    def write(self, number: int, data: bytes | memoryview) -> None:
        """Append `data`."""
        with self._hashing(data):
            self._take(number, memoryview(data))

    @contextmanager
    def _hashing(self, data: bytes | memoryview) -> Iterator[None]:
        """Hash `data` while the block stores it."""
        if len(data) < EXTENT:
            self._hash.update(data)
            yield
            return
        thread = threading.Thread(target=self._hash.update, args=(data,), name="hash", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _take(self, number: int, view: memoryview) -> None:
        if self._tail:
            room = EXTENT - len(self._tail)
            self._tail += view[:room]
            view = view[room:]
            if len(self._tail) < EXTENT:
                return
            self._store(number, memoryview(bytes(self._tail)))
            self._tail.clear()
        whole = len(view) // EXTENT * EXTENT
        for start in range(0, whole, BATCH):
            self._store(number, view[start : min(start + BATCH, whole)])
        self._tail += view[whole:]

    def _store(self, number: int, data: memoryview) -> None:
        self._index = extents.append(self._blobs, number, self._index, data)
        self.durable = self._index * EXTENT
        hit("content.ingest.written")

    def store_tail(self, number: int) -> None:
        """Make the last bytes durable, in an extent that a later one takes the place of."""
        if self.durable < self.size:
            extents.append(self._blobs, number, self._index, memoryview(self._tail))
            self.durable = self.size
