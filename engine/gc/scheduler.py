"""When to collect: by containerd's rules, and on time for whatever expires.

Async. After each collection there is a pause that keeps them to a share of the time. When it is over,
the store is looked at: it is collected if something was deleted or expired, or if enough was written, by
any process. Where no share is given no such pause is planned, and looks alone decide. Whoever asks for a
collection waits for one that begins after that, and shares it with all who asked by then.
"""

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio

from engine import limits
from engine.errors import EngineError, InvalidArgument, Unavailable
from engine.gc.activity import Seen
from engine.gc.collect import Collected
from engine.gc.policy import Policy

__all__ = ["Schedule", "Scheduler", "scheduling"]

_log = logging.getLogger(__name__)

_LEAST_S = 0.005  # that a collection counts for
_POLL_S = (
    0.25  # where no pause sets the pace: other processes cannot tell us that they changed something
)
_LOOKS = 50  # a look is worth so many times what it takes
_RETRY_S = 1.0
_S = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When an engine collects: containerd's settings, with its defaults; times in seconds."""

    pause_threshold: float = 0.02
    """The share of time that collections take, at most half; 0: no collection without a reason."""
    deletion_threshold: int = 0
    """After so many deletions at once; 0: when the pause is over."""
    mutation_threshold: int = 100
    """After so many transactions when the pause is over, though nothing was deleted; 0: never."""
    schedule_delay: float = 0.0
    """Between a reason and the collection, for more to come together."""
    startup_delay: float = 0.1
    """Before the first collection, which needs no reason; 0: no such collection."""
    policy: Policy | None = None
    """Which images to remove when the disk is full or they are old."""

    def __post_init__(self) -> None:
        if not 0 <= self.pause_threshold <= 0.5:
            raise InvalidArgument(f"pause_threshold {self.pause_threshold} is not from 0 to 0.5")
        counts = (self.deletion_threshold, self.mutation_threshold)
        if min(*counts, self.schedule_delay, self.startup_delay) < 0:
            raise InvalidArgument("the thresholds and delays of a schedule are not negative")


class _Waiter:
    """Someone who asked for a collection, and what came of it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: Collected | Exception | None = None

    def end(self, result: Collected | Exception) -> None:
        self.result = result
        self.done.set()


class Scheduler:
    """Collects when it is time to. `run` must be running."""

    def __init__(
        self,
        schedule: Schedule,
        collect: Callable[[], Awaitable[Collected]],
        look: Callable[[int, Seen], Awaitable[Seen]],
    ) -> None:
        """`look` is `engine.gc.activity.glance` of a store, on a thread."""
        self._schedule = schedule
        self._do_collect = collect
        self._do_look = look
        self._waiters: list[_Waiter] = []
        self._asked = trio.Event()
        self._at = math.inf  # when to collect, or to see whether there is a reason to
        self._is_wanted = False
        self._rested = 0.0  # when the pause is over
        self._interval = schedule.schedule_delay
        self._spent, self._count = 0.0, 0
        self._expires: int | None = None  # as the last collection says
        self._look_s = 0.0
        self._since = self._seen = Seen(at=0, transactions=0, deletions=0, expires=None)
        self._seen_at = 0.0

    async def collect(self) -> Collected:
        """Have a collection begin and return what it did; raise what it failed with."""
        waiter = _Waiter()
        self._waiters.append(waiter)
        self._asked.set()
        await waiter.done.wait()
        if isinstance(waiter.result, Exception):
            raise waiter.result
        assert waiter.result is not None
        return waiter.result

    async def run(self) -> None:
        """Collect whenever it is time to, until cancelled."""
        try:
            self._since = await self._look()
            if self._schedule.startup_delay:
                self._want(self._schedule.startup_delay)
            while True:
                await self._due()
                await self._run()
        finally:
            for waiter in self._waiters:
                waiter.end(Unavailable("the engine was closed before a collection could end"))

    def _want(self, delay: float) -> None:
        """Have a collection after a delay, unless one comes sooner."""
        self._is_wanted = True
        self._at = min(self._at, trio.current_time() + delay)

    # -- waiting ------------------------------------------------------------------------------

    async def _due(self) -> None:
        """Wait until it is time to collect."""
        delay = self._schedule.schedule_delay
        while True:
            if self._waiters:
                self._want(delay)
            if trio.current_time() >= self._at:
                if self._is_wanted or await self._has_reason():
                    return
                self._at = trio.current_time() + max(self._interval, self._look_s * _LOOKS)
            with trio.move_on_at(min(self._at, self._next_look())):
                await self._asked.wait()
            self._asked = trio.Event()
            if not self._is_wanted and trio.current_time() < self._at and await self._is_urgent():
                self._want(delay)

    def _next_look(self) -> float:
        """Return when to look whether something is urgent."""
        if self._is_wanted:
            return math.inf
        now = trio.current_time()
        looks = [math.inf]
        if self._schedule.deletion_threshold or math.isinf(self._at):
            looks.append(now + max(_POLL_S, self._look_s * _LOOKS))
        for moment in (self._expires, self._seen.expires):
            if moment is not None:
                at = self._seen_at + (moment - self._seen.at) / _S
                looks.append(max(self._rested, at, now + _LEAST_S))
        return min(looks)

    async def _has_reason(self) -> bool:
        """Say whether to collect now that the pause is over."""
        await self._look()
        return bool(self._deleted() or self._is_due() or self._has_expired())

    async def _is_urgent(self) -> bool:
        """Say whether to collect sooner than planned, or though nothing is."""
        await self._look()
        is_planned = not math.isinf(self._at)
        threshold = self._schedule.deletion_threshold or (math.inf if is_planned else 1)
        if self._deleted() >= threshold:
            return True
        is_rested = trio.current_time() >= self._rested
        return is_rested and (self._has_expired() or (self._is_due() and not is_planned))

    def _deleted(self) -> int:
        return abs(self._seen.deletions - self._since.deletions)  # a count may have begun anew

    def _is_due(self) -> bool:
        """Say whether enough was written, or a policy has something to do and was not tried just now."""
        written = self._seen.transactions - self._since.transactions
        waited = self._seen.at - self._since.at
        is_pressed = self._seen.is_pressed and waited >= limits.POLICY_EVERY_S * _S
        return 0 < self._schedule.mutation_threshold <= written or is_pressed

    def _has_expired(self) -> bool:
        """Say whether something expired since the last collection, or the clock was set back."""
        moments = (self._expires, self._seen.expires)
        is_over = any(moment is not None and moment <= self._seen.at for moment in moments)
        return is_over or self._seen.at < self._since.at

    async def _look(self) -> Seen:
        """Look at the store; what was seen last counts where that fails."""
        began = trio.current_time()
        try:
            self._seen = await self._do_look(self._since.at, self._seen)
        except EngineError as error:
            _log.warning("whether to collect cannot be seen: %s", error)
        self._seen_at = trio.current_time()
        self._look_s = self._seen_at - began
        return self._seen

    # -- collecting ---------------------------------------------------------------------------

    async def _run(self) -> None:
        waiters, self._waiters = self._waiters, []
        self._is_wanted = False
        before = await self._look()
        began = trio.current_time()
        result: Collected | Exception
        try:
            result = await self._do_collect()
            self._count += 1
            self._spent += trio.current_time() - began
        except Exception as error:  # noqa: BLE001  whatever it is, the engine goes on
            result = error
            _log.warning("a collection failed: %s", error)
        except BaseException:
            self._waiters += waiters
            raise
        self._settle(result, before, await self._look())
        for waiter in waiters:
            waiter.end(result)

    def _settle(self, result: Collected | Exception, before: Seen, after: Seen) -> None:
        """Plan the next collection, or look, after one."""
        now, share = trio.current_time(), self._schedule.pause_threshold
        # What users deleted meanwhile may have come too late for this one; what it wrote is its own.
        self._since = msgspec.structs.replace(after, at=before.at, deletions=before.deletions)
        self._at = math.inf
        if isinstance(result, Exception):
            self._interval += _RETRY_S
            self._want(self._interval)
            return
        self._expires = result.expires
        mean = max(_LEAST_S, self._spent / self._count)
        self._interval = mean / share - mean if share else _RETRY_S
        self._rested = now + self._interval
        if share:
            self._at = self._rested


@asynccontextmanager
async def scheduling(scheduler: Scheduler) -> AsyncIterator[None]:
    """Run a scheduler for the length of a block; a collection under way ends with it, cleanly."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scheduler.run)
        try:
            yield
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001  as it is: the nursery would wrap it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
