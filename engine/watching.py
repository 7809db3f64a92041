"""Progress as a stream of values: a report that is iterated over while the work goes on.

Async; what is reported may come from any thread. Who reads slowly has the latest state, and holds up
nothing: there is one state, however much is reported.
"""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import trio

from engine.progress import Headway, Step
from engine.tally import Tally
from engine.waking import Bell

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
        self._bell = Bell()

    def __call__(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Take note: this is what reports."""
        self._tally(step, item, total, done)
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

    async def __aiter__(self) -> AsyncIterator[Headway]:
        """Yield how far all is until it is over."""
        is_last = False
        while not is_last:
            is_last = self._is_over
            with self._bell.heard() as news:  # first: what is told from now on is seen next time
                yield self.headway()
                with trio.move_on_after(0 if is_last else _STILL_S):
                    await news.wait()
            if not self._is_over:
                await trio.sleep(_PACE_S)
