"""A large blob in several ranges at once: asked for beside each other, given in order as one body.

Async. Each range beyond the first has a lane as long as bytes of it are in memory, and takes one only
where nobody waits for it. A host that does not do as it is asked is asked for no more of them.
"""

from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio

from engine import limits
from engine.errors import EngineError, Unavailable
from engine.registry.lanes import ImageLanes
from engine.registry.retrying import Busy

if TYPE_CHECKING:  # which loads httpcore: not for those who have a client handed to them
    from engine.registry.client import Body

__all__ = ["Ranges", "first_end"]

_WORTH_WAKING = 256 * 1024  # bytes: the reader is not woken for each packet
_ASKED = 2  # times, of a range that broke off; then the whole goes on as one stream


def first_end(offset: int, size: int) -> int | None:
    """Return where the first range of the rest of a blob ends, None if all is asked for at once."""
    return offset + limits.RANGE if size - offset > limits.RANGES_FROM else None


class Ranges:
    """The rest of a blob, of which `first` is the beginning; there is one reader."""

    def __init__(
        self, first: "Body", start: int, size: int, lanes: ImageLanes, nursery: trio.Nursery
    ) -> None:
        """Work in `nursery` until `close`; the first of `size` bytes in all begins at `start`."""
        self._start = start
        self._first: Body | None = first
        self._opener = first
        self._size = size if first.is_as_asked else first.end
        self._next = first.end
        self._lanes = lanes
        self._nursery = nursery
        self._parts: deque[_Part] = deque()
        self._is_own_free = False
        self._is_refused = False
        self._waited = 0.0

    async def read(self) -> bytes:
        """Return some more bytes, none at the end. Raises Unavailable, BadAnswer."""
        if self._first:
            began = trio.current_time()
            chunk = await self._first.read()
            self._waited += trio.current_time() - began
            await self._lanes.passed(len(chunk))
            if chunk or self._next == self._first.end == self._size:
                return chunk
            await self._first.aclose()
            self._first = None
            self._is_own_free = True
            self._ask_more()
        while self._parts:
            try:
                if chunk := await self._parts[0].taken():
                    return chunk
            except EngineError as error:  # which may be of ranges alone
                raise Unavailable(str(error)) from None
            await self._parts.popleft().was_followed.wait()
        return b""

    def close(self) -> None:
        """Let go of what is on its way."""
        self._next = self._size
        for part in self._parts:
            part.scope.cancel()

    def _ask_more(self) -> None:
        while self._next < self._size and not self._is_refused:
            # A host whose one connection is that quick is not what others wait for.
            is_quick = (self._opener.end - self._start) > self._waited * limits.RANGE_RATE
            if is_quick and self._parts:
                return
            lane = self._lane()
            if lane is None:
                return
            # Nobody is beside it: what comes alone is asked for in long ranges.
            is_alone = not self._parts and (is_quick or self._lanes.are_taken(self._opener.host))
            end = min(self._next + (limits.RANGE_ALONE if is_alone else limits.RANGE), self._size)
            part = _Part(self._next, end)
            self._parts.append(part)
            self._next = end
            self._nursery.start_soon(self._bring, part, lane)

    def _lane(self) -> ExitStack | None:
        """Return the lane that the first range had, or one to spare."""
        if not self._is_own_free:
            return self._lanes.spare(self._opener.host)
        self._is_own_free = False
        own = ExitStack()
        own.callback(self._free_own)
        return own

    def _free_own(self) -> None:
        self._is_own_free = True

    async def _bring(self, part: "_Part", lane: ExitStack) -> None:
        with lane, part.scope:
            try:
                await self._receive(part)
                part.end_with(None)
            except EngineError as error:
                self._is_refused = True
                part.end_with(error)
            await part.was_taken.wait()
        self._ask_more()
        part.was_followed.set()

    async def _receive(self, part: "_Part") -> None:
        asked = 0
        while part.position < part.end:
            asked += 1
            try:
                async with self._opener.part(part.position, part.end) as body:
                    while chunk := await body.read():
                        await self._lanes.passed(len(chunk))
                        await part.give(chunk)
            except Busy:
                raise
            except Unavailable:
                if asked == _ASKED:
                    raise


class _Part:
    """A range on its way: what came of it and was not taken yet."""

    def __init__(self, start: int, end: int) -> None:
        self.position = start
        self.end = end
        self.scope = trio.CancelScope()
        self.was_taken = trio.Event()
        self.was_followed = trio.Event()
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._error: EngineError | None = None
        self._has_ended = False
        self._has_some = trio.Event()
        self._has_room = trio.Event()

    async def give(self, chunk: bytes) -> None:
        """Add bytes; wait as long as there are too many."""
        self._chunks.append(chunk)
        self.position += len(chunk)
        self._held += len(chunk)
        if self._held >= min(_WORTH_WAKING, limits.RANGE):
            self._has_some.set()
        while self._held >= limits.RANGE and self.position < self.end:
            self._has_room = trio.Event()
            await self._has_room.wait()

    def end_with(self, error: EngineError | None) -> None:
        """Note that no more comes, and why, if there is more."""
        self._error = error
        self._has_ended = True
        self._has_some.set()

    async def taken(self) -> bytes:
        """Return some more bytes, none at the end. Raises what the part failed with."""
        while not self._chunks:
            if self._has_ended:
                self.was_taken.set()
                if self._error:
                    raise self._error
                return b""
            self._has_some = trio.Event()
            await self._has_some.wait()
        chunk = self._chunks.popleft()
        self._held -= len(chunk)
        self._has_room.set()
        return chunk
