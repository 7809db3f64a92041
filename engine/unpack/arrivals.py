"""Blobs on their way into the store: how far each is, for those who read it already.

Async. Whoever brings a blob in says so beforehand, and tells how far its bytes are durable; a layer is
applied behind him. When he leaves before the end, another who brings the same blob goes on where he
stopped; with the last of them the blob has failed.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import trio

from engine.errors import EngineError, Unavailable
from engine.kv.schema import Blob
from engine.oci.digest import Digest

__all__ = ["Arrival", "Arrivals"]


class Arrival:
    """A blob on its way in: bytes up to `there` of `number` are durable, all of them once it `is_whole`.

    Its digest is verified when it is whole, not before.
    """

    def __init__(self, blob: Blob | None = None) -> None:
        """Follow a blob to come, or stand for one that is there."""
        self.blob = blob
        self.number = blob.number if blob else 0
        self.there = blob.size if blob else 0
        self.bringers = 0
        self._error: EngineError | None = None
        self._news = trio.Event()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there, and verified."""
        return self.blob is not None

    def tell(self, number: int, there: int) -> None:
        """Note how far the bytes of a number are durable."""
        self.number, self.there = number, there
        self._wake()

    def come(self, blob: Blob) -> None:
        """Note that all is there; under another number, if an equal blob came first."""
        self.blob = blob
        self.tell(blob.number, blob.size)

    def fail(self, error: EngineError) -> None:
        """Note that nobody brings it any more."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def beyond(self, seen: int) -> None:
        """Wait until more than `seen` bytes are there, or all. Raises what the blob failed with."""
        while not (self.is_whole or self.there > seen):
            if self._error:
                raise self._error
            await self._news.wait()

    async def whole(self) -> Blob:
        """Wait until all is there and verified. Raises what the blob failed with."""
        while self.blob is None:
            if self._error:
                raise self._error
            await self._news.wait()
        return self.blob


class Arrivals:
    """The blobs on their way in."""

    def __init__(self) -> None:
        self._coming: dict[tuple[str, Digest], Arrival] = {}

    @contextmanager
    def bringing(self, namespace: str, digests: Iterable[Digest]) -> Iterator[Mapping[Digest, Arrival]]:
        """Give the arrivals of blobs that the block brings in, shared with others who do."""
        mine: dict[Digest, Arrival] = {}
        for digest in dict.fromkeys(digests):
            mine[digest] = self._coming.setdefault((namespace, digest), Arrival())
            mine[digest].bringers += 1
        error: EngineError = Unavailable("whoever brought the layer in has given up; start again")
        try:
            yield mine
        except EngineError as found:
            error = found
            raise
        finally:
            for digest, arrival in mine.items():
                arrival.bringers -= 1
                if not arrival.bringers:
                    del self._coming[namespace, digest]
                    if not arrival.is_whole:
                        arrival.fail(error)
