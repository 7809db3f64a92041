"""Who may have a body on its way: so many of an engine, a host and an image, and so many bytes a second.

Async. A body has a lane for as long as bytes of it are in memory, so that lanes bound those too. Who
waits for one of his image or of a slow host has none of the engine's meanwhile: he is in nobody's way.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from weakref import WeakValueDictionary

import trio

from engine import limits
from engine.errors import InvalidArgument
from engine.registry.bandwidth import Bandwidth

__all__ = ["ImageLanes", "Lanes"]


class Lanes:
    """The lanes of an engine."""

    def __init__(self, fetches: int | None = None, bandwidth: float | None = None) -> None:
        """`fetches` bodies at once, and so many bytes a second. Raises InvalidArgument below 1."""
        if (fetches is not None and fetches < 1) or (bandwidth is not None and bandwidth < 1):
            raise InvalidArgument("at least one fetch at once and one byte a second are needed")
        self._engine = trio.CapacityLimiter(fetches or limits.FETCHES)
        self._hosts: WeakValueDictionary[str, trio.CapacityLimiter] = WeakValueDictionary()
        self._bandwidth = Bandwidth(bandwidth) if bandwidth else None

    def of_image(self) -> "ImageLanes":
        """Return the lanes of one image."""
        return ImageLanes(self)

    def limiters(self, host: str) -> Iterator[trio.CapacityLimiter]:
        """Give what bounds the bodies of a host, and those of all."""
        made = trio.CapacityLimiter(limits.FETCHES_OF_HOST)
        yield self._hosts.setdefault(host, made)
        yield self._engine

    async def passed(self, count: int) -> None:
        """Wait until so many bytes more are within the bandwidth."""
        if self._bandwidth:
            await self._bandwidth.take(count)


class ImageLanes:
    """The lanes of one image, of those of its engine."""

    def __init__(self, lanes: Lanes) -> None:
        self.passed = lanes.passed
        self._lanes = lanes
        self._own = trio.CapacityLimiter(limits.FETCHES_OF_IMAGE)

    @asynccontextmanager
    async def lane(self, host: str) -> AsyncIterator[None]:
        """Wait for a lane from a host and have it for the length of a block."""
        body = object()
        with ExitStack() as stack:
            for limiter in self._limiters(host):
                await limiter.acquire_on_behalf_of(body)
                stack.callback(limiter.release_on_behalf_of, body)
            yield

    def spare(self, host: str) -> ExitStack | None:
        """Return a lane to have until a block ends, None if there is none that nobody waits for."""
        body = object()
        with ExitStack() as stack:
            for limiter in self._limiters(host):
                try:
                    limiter.acquire_on_behalf_of_nowait(body)
                except trio.WouldBlock:
                    return None
                stack.callback(limiter.release_on_behalf_of, body)
            return stack.pop_all()

    def are_taken(self, host: str) -> bool:
        """Say whether there is no lane to spare."""
        return any(limiter.available_tokens < 1 for limiter in self._limiters(host))

    def _limiters(self, host: str) -> tuple[trio.CapacityLimiter, ...]:
        return (self._own, *self._lanes.limiters(host))
