"""The bytes of blobs: extents under (blob number, index), written and read in order.

Sync; safe from any thread. Knows nothing of digests: the record that names a blob's number is in
`meta.lmdb` (`engine.kv.schema`).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from engine.errors import DataLoss
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import EXTENT
from engine.memory import keep_memory

__all__ = ["append", "drop", "feed", "follow", "numbers", "read", "stored_bytes", "view"]

_RELEASE_EVERY = 32  # extents read between two calls that give their memory back
_FED_AT_ONCE = 16  # extents in one transaction, some milliseconds to a hash
_FED_UNRELEASED = 2048  # extents, 2 GiB: to give memory back takes a twentieth of the time to hash it
_DROP_AT_ONCE = 128  # extents, and ends of blobs, in one transaction: others can write in between


def _key(number: int, index: int) -> bytes:
    return number.to_bytes(8, "big") + index.to_bytes(4, "big")


def append(blobs: Environment, number: int, index: int, data: memoryview) -> int:
    """Store `data` from extent `index` on in one durable transaction; return the next index.

    All of `data` but the blob's last extent must be whole extents. LMDB holds a transaction's pages
    in memory: keep `data` under 16 MiB.
    """
    keep_memory()
    with blobs.write() as txn:
        for start in range(0, len(data), EXTENT):
            txn.raw.put(_key(number, index), data[start : start + EXTENT])
            index += 1
    return index


def read(blobs: Environment, number: int, size: int) -> Iterator[bytes]:
    """Yield a blob's extents in order, as `follow`."""
    return follow(blobs, number, lambda _seen: (size, True))


def follow(
    blobs: Environment, number: int, await_more: Callable[[int], tuple[int, bool]]
) -> Iterator[bytes]:
    """Yield the extents of a blob in order, while they are still being written.

    `await_more` waits until there are more than so many bytes, and returns how many, and whether those
    are all. Each extent is copied in a transaction that ends before it is handed out: a reader that
    takes its time never holds back the pages that others free. Raises DataLoss where an extent is
    missing or has the wrong length.
    """
    size, is_whole = 0, False
    for index in count():
        start = index * EXTENT
        while not is_whole and size < start + EXTENT:  # the last extent is written anew as it grows
            size, is_whole = await_more(size)
        if start >= size:
            return
        with view(blobs, number, index, size) as extent:
            piece = bytes(extent)
        yield piece
        if index % _RELEASE_EVERY == _RELEASE_EVERY - 1:
            blobs.release_pages()


def feed(blobs: Environment, number: int, size: int, take: Callable[[memoryview], object]) -> None:
    """Call `take` with a blob's extents in order, on the map. Raises DataLoss as `read` does."""
    count = -(-size // EXTENT)
    for start in range(0, count, _FED_AT_ONCE):
        with blobs.read() as txn:
            for index in range(start, min(start + _FED_AT_ONCE, count)):
                with _extent(txn, number, index, size) as extent:
                    take(extent)
        if start % _FED_UNRELEASED == _FED_UNRELEASED - _FED_AT_ONCE:
            blobs.release_pages()


@contextmanager
def view(blobs: Environment, number: int, index: int, size: int) -> Iterator[memoryview]:
    """Give one extent of a blob of `size` bytes on the map. Raises DataLoss as `read` does."""
    with blobs.read() as txn, _extent(txn, number, index, size) as extent:
        yield extent


def _extent(txn: Transaction, number: int, index: int, size: int) -> memoryview:
    found = txn.raw.get(_key(number, index))
    if found is None or len(found) != min(EXTENT, size - index * EXTENT):
        raise DataLoss(
            f"extent {index} of blob {number} is missing or damaged: "
            "remove the image and import it again"
        )
    return memoryview(found)


def stored_bytes(blobs: Environment, number: int) -> int:
    """Return how many bytes of a blob are durable, looking only at its extents."""
    with blobs.read() as txn, txn.raw.cursor() as cursor:
        last = _last(txn, number)
        if last is None or not cursor.set_key(_key(number, last)):
            return 0
        return last * EXTENT + len(cursor.value())


def numbers(blobs: Environment) -> Iterator[int]:
    """Yield the numbers that have extents, each found in a transaction of its own."""
    number = 0
    while True:
        with blobs.read() as txn, txn.raw.cursor() as cursor:
            if not cursor.set_range(_key(number, 0)):
                return
            number = int.from_bytes(cursor.key()[:8], "big")
        yield number
        number += 1


def _last(txn: Transaction, number: int) -> int | None:
    with txn.raw.cursor() as cursor:
        found = cursor.last() if not cursor.set_range(_key(number + 1, 0)) else cursor.prev()
        key = bytes(cursor.key()) if found else b""
    return int.from_bytes(key[8:], "big") if key[:8] == number.to_bytes(8, "big") else None


def drop(blobs: Environment, numbers: Sequence[int], *, until: float = math.inf) -> Iterator[list[int]]:
    """Delete all extents of some blobs, in bounded transactions; yield whose are gone after each.

    Nothing more is done after `until`, of the monotonic clock.
    """
    left = deque(numbers)
    while left and time.monotonic() <= until:
        gone: list[int] = []
        with blobs.write() as txn, txn.raw.cursor() as cursor:
            for _ in range(_DROP_AT_ONCE):
                prefix = left[0].to_bytes(8, "big")
                if cursor.set_range(prefix) and bytes(cursor.key()[:8]) == prefix:
                    cursor.delete()
                else:
                    gone.append(left.popleft())
                if not left:
                    break
        yield gone
