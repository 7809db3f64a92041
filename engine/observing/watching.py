"""Progress as a stream of values: a report that is iterated over while the work goes on.

Async; what is reported may come from any thread. Who reads slowly has the latest state, and holds up
nothing: there is one state, however much is reported.
"""

from types import TracebackType
from typing import Self

import trio

from engine.observing.tally import Tally
from engine.observing.waking import Bell
from engine.progress import Headway, Step

__all__ = ["Watch"]

_PACE_S = 0.1
_STILL_S = 1.0  # without news: a rate falls, and who draws it wants to know


class Watch:
    """Give it to a call as its `report`, and iterate over it meanwhile: it yields how far that is.

        with engine.Watch() as watch:
            nursery.start_soon(show, watch)  # async for headway in watch: ...
            await e.pull("busybox", client, report=watch)

    A value comes at most ten times a second and at least once a second; the last one, after the block
    has ended, is how far all was in the end. Several may iterate, each at his own pace.
    """

    def __init__(self) -> None:
        """Begin with nothing told."""
        self._tally = Tally()
        self._is_over = False
        self._news = 0
        self._bell = Bell()

    def __call__(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Take note: this is what reports."""
        self._tally(step, item, total, done)
        self._news += 1
        self._bell.ring()

    def headway(self) -> Headway:
        """Return how far all is now; from any thread."""
        return self._tally.headway()

    def close(self) -> None:
        """End the stream, which yields once more."""
        self._is_over = True
        self._bell.ring()

    def __enter__(self) -> Self:
        """Watch until the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the stream."""
        self.close()

    def __aiter__(self) -> "_Looks":
        """Give one who looks: at once, when there is news, and in the end."""
        return _Looks(self)

    @property
    def _state(self) -> tuple[int, bool]:
        return self._news, self._is_over


class _Looks:
    """One who looks at a watch now and then."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen: tuple[int, bool] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Headway:
        await trio.lowlevel.checkpoint()
        if self._seen is not None:
            if self._seen[1]:
                raise StopAsyncIteration
            await self._news(self._seen)
        self._seen = self._watch._state
        return self._watch.headway()

    async def _news(self, seen: tuple[int, bool]) -> None:
        with self._watch._bell.heard() as news, trio.move_on_after(_STILL_S):
            if self._watch._state == seen:
                await news.wait()
        if not self._watch._state[1]:
            await trio.sleep(_PACE_S)
