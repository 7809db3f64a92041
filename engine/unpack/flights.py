"""The same work once: callers that ask for one key while it is under way share it.

Async. Each caller can leave alone; when the last one does, the work is cancelled. Work belongs to no
caller: it runs as a task of its own, and what it holds (a lease) it holds until the last caller left,
so that each can pin the result. A flight is compared by identity: one that failed or is being cancelled
is never joined, nor taken away for another that has its key by now.
"""

import logging
import signal
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import trio

from engine.errors import FailedPrecondition, Unavailable
from engine.observing.tally import Tally
from engine.progress import Report, Step

__all__ = ["Flight", "Flights", "tell"]

_log = logging.getLogger(__name__)
T = TypeVar("T")
F = TypeVar("F", bound="Flight[Any]")


class Flight(Generic[T]):
    """Work under way. `done` is set when there is a result or an error.

    `item` is what is told to be shared: a layer by its digest, else all that the callers want.
    """

    def __init__(self) -> None:
        self.item = ""
        self.done = trio.Event()
        self.error: Exception | None = None
        self._result: T | None = None
        self._reports: list[Report] = []
        self._told = Tally()
        self._scope = trio.CancelScope()
        self._left = trio.Event()
        self._ended = trio.Event()

    def report(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Tell all callers, and those who join later."""
        self._told(step, item, total, done)
        for report in self._reports:
            tell(report, step, item, total, done)

    async def result(self) -> T:
        """Wait for the result, or raise the error."""
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return cast("T", self._result)

    async def run(self, work: AbstractAsyncContextManager[T]) -> None:
        """Do the work; a task of its own, started by `Flights`."""
        try:
            with self._scope:
                try:
                    async with work as self._result:
                        self.done.set()
                        await self._left.wait()
                except Exception as error:  # noqa: BLE001  it is raised again in every caller
                    self.error = error
        except (KeyboardInterrupt, BaseExceptionGroup) as error:
            self.error = Unavailable("interrupted")
            _pass_on(error)
        finally:
            self.done.set()
            self._ended.set()

    def join(self, report: Report) -> None:
        """Add a caller, who is told where all is."""
        self._reports.append(report)
        self._told.replay(partial(tell, report))
        self._count()

    def leave(self, report: Report) -> bool:
        """Take a caller away; say whether it was the last one, which ends the work."""
        self._reports.remove(report)
        if self._reports:
            self._count()
            return False
        self._left.set()
        if not self.done.is_set():
            self._scope.cancel()
        return True

    def _count(self) -> None:
        callers = len(self._reports)
        self.report(Step.SHARE, self.item, callers, callers)

    def close(self) -> None:
        """Cancel the work, whoever waits for it."""
        if not self.done.is_set():
            self.error = FailedPrecondition("the engine was closed meanwhile; open it for longer")
            self._scope.cancel()
        self._left.set()

    async def ended(self) -> None:
        """Wait until the work, whose last caller left, holds nothing any more."""
        await self._ended.wait()


def _pass_on(error: BaseException) -> None:
    """Have an interrupt that trio raised in a task of the work raised in the main task, as it should be.

    In this one it would end the loop with an internal error. Anything else is a bug.
    """
    rest = error.split(KeyboardInterrupt)[1] if isinstance(error, BaseExceptionGroup) else None
    if rest is not None:
        raise error
    signal.raise_signal(signal.SIGINT)


def tell(report: Report, step: Step, item: str, total: int, done: int, /) -> None:
    """Tell a caller; one whose report fails does not spoil it for the others."""
    try:
        report(step, item, total, done)
    except Exception:  # noqa: BLE001  anyone's function
        _log.exception("a report of progress failed")


class Flights(Generic[F]):
    """The work under way, by key."""

    def __init__(self, make: Callable[[], F], shared: Callable[[], None] = lambda: None) -> None:
        """`make` makes a flight; `shared` is called for each caller who joins one of another's."""
        self._make = make
        self._shared = shared
        self._flights: dict[Hashable, F] = {}
        self._running: set[F] = set()

    async def aclose(self) -> None:
        """Cancel what is under way, and wait until it holds nothing."""
        running = [*self._running]
        for flight in running:
            flight.close()
        for flight in running:
            await flight.ended()

    async def _run(self, flight: F, work: AbstractAsyncContextManager[Any]) -> None:
        try:
            await flight.run(work)
        finally:
            self._running.discard(flight)

    @asynccontextmanager
    async def caller(
        self, report: Report
    ) -> AsyncIterator[Callable[[Hashable, Callable[[F], AbstractAsyncContextManager[Any]]], F]]:
        """Give what joins the flight of a key, started with the work given if there is none.

        The work is called at once, and entered when its task has a turn.
        At the end of the block the caller leaves all that it joined, the last one first.
        """
        joined: list[tuple[Hashable, F]] = []

        def join(key: Hashable, work: Callable[[F], AbstractAsyncContextManager[Any]]) -> F:
            flight = self._flights.get(key)
            if flight is None or flight.error is not None:
                flight = self._flights[key] = self._make()
                # Of the whole run, not of this caller: any of them may be the first to leave.
                self._running.add(flight)
                trio.lowlevel.spawn_system_task(self._run, flight, work(flight))
            else:
                self._shared()
            flight.join(report)
            joined.append((key, flight))
            return flight

        try:
            yield join
        finally:
            ending = [(key, flight) for key, flight in reversed(joined) if flight.leave(report)]
            for key, flight in ending:
                if self._flights.get(key) is flight:
                    del self._flights[key]
            with trio.CancelScope(shield=True):
                for _, flight in ending:
                    await flight.ended()
