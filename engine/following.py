"""Unpacks the images of an import while their layers come in.

Async, but for what the thread of the import calls (`engine.archive.intake.Follower`). An image that
cannot be unpacked ends its import there, and one that does not come in ends its unpacking.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import trio

from engine.content.image import ResolvedImage
from engine.errors import EngineError
from engine.kv.schema import Blob
from engine.oci.digest import Digest
from engine.unpack.arrivals import Arrival, Arrivals
from engine.unpack.unpacker import Unpacked

__all__ = ["Following", "Unpack"]

Unpack = Callable[[ResolvedImage, Mapping[Digest, Arrival] | None], Awaitable[Unpacked]]
"""Unpack an image whose layers are on their way in, or here."""


class _Outcome:
    """What becomes of the unpacking of one image."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.unpacked: Unpacked | None = None
        self.error: EngineError | None = None

    async def of(self, unpack: Awaitable[Unpacked]) -> None:
        try:
            self.unpacked = await unpack
        except EngineError as error:
            self.error = error
        finally:
            self.done.set()


class Following:
    """Keeps up with one import; `unpack` is what there is to do for each image."""

    def __init__(
        self, arrivals: Arrivals, namespace: str, nursery: trio.Nursery, unpack: Unpack
    ) -> None:
        self._arrivals = arrivals
        self._namespace = namespace
        self._nursery = nursery
        self._unpack = unpack
        self._mine: Mapping[Digest, Arrival] = {}
        self._now = _Outcome()
        self._outcomes: dict[int, _Outcome] = {}

    async def unpacked(self, image: ResolvedImage) -> Unpacked:
        """Return what came of an image that came in, unpacked now if its layers were not foretold."""
        outcome = self._outcomes.get(id(image))
        if outcome is None:
            return await self._unpack(image, None)
        await outcome.done.wait()
        if outcome.error:
            raise outcome.error
        assert outcome.unpacked
        return outcome.unpacked

    # -- on the import's thread ---------------------------------------------------------------

    @contextmanager
    def following(self, image: ResolvedImage) -> Iterator[None]:
        """Unpack an image whose layers the block brings in."""
        digests = [layer.descriptor.key for layer in image.layers]
        bringing = self._arrivals.bringing(self._namespace, digests)
        self._mine = trio.from_thread.run_sync(bringing.__enter__)
        try:
            trio.from_thread.run_sync(self._begin, image)
            yield
        except BaseException as error:
            trio.from_thread.run_sync(bringing.__exit__, type(error), error, error.__traceback__)
            raise
        else:
            trio.from_thread.run_sync(bringing.__exit__, None, None, None)
        finally:
            self._mine = {}

    def _begin(self, image: ResolvedImage) -> None:
        self._now = self._outcomes[id(image)] = _Outcome()
        self._nursery.start_soon(self._now.of, self._unpack(image, self._mine))

    def tell(self, digest: Digest, number: int, there: int) -> None:
        """Pass on how far a layer is; raise what its image could not be unpacked for."""
        if digest in self._mine:
            trio.from_thread.run_sync(self._tell, self._mine[digest], number, there)

    def _tell(self, arrival: Arrival, number: int, there: int) -> None:
        if self._now.error:
            raise self._now.error
        arrival.tell(number, there)

    def come(self, digest: Digest, blob: Blob) -> None:
        """Pass on that a layer is here."""
        if digest in self._mine:
            trio.from_thread.run_sync(self._mine[digest].come, blob)
