"""Places at which layers are applied, so many at a time; the lowest in order of those that wait is next.

Async. Who waits for bytes gives his place up meanwhile, so that what is ready is never behind it.
"""

import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import trio

__all__ = ["Order", "Slot", "Slots"]

Order = tuple[int, ...]
"""Where in the order of work something is: what is lower goes first."""


class Slots:
    """So many places."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._free = places
        self._waiting: list[tuple[Order, int, trio.Event]] = []
        self._asked = count()

    @asynccontextmanager
    async def slot(self, order: Order) -> AsyncIterator["Slot"]:
        """Wait for a place and have it for the length of a block."""
        await self.take(order)
        slot = Slot(self, order)
        try:
            yield slot
        finally:
            if slot.is_taken:
                self.leave()

    async def take(self, order: Order) -> None:
        """Wait for a place and have it until `leave`."""
        await trio.lowlevel.checkpoint()
        if self._free:
            self._free -= 1
            return
        mine = (order, next(self._asked), trio.Event())
        heapq.heappush(self._waiting, mine)
        try:
            await mine[2].wait()
        except trio.Cancelled:
            if mine[2].is_set():
                self.leave()
            else:
                self._waiting.remove(mine)
                heapq.heapify(self._waiting)
            raise

    def leave(self) -> None:
        """Give a place to who is next."""
        if self._waiting:
            heapq.heappop(self._waiting)[2].set()
        else:
            self._free += 1


class Slot:
    """A place that is had."""

    def __init__(self, slots: Slots, order: Order) -> None:
        self._slots = slots
        self._order = order
        self.is_taken = True

    @asynccontextmanager
    async def given_up(self) -> AsyncIterator[None]:
        """Let others have the place for the length of a block, and wait for one then."""
        self.is_taken = False
        self._slots.leave()
        yield
        await self._slots.take(self._order)
        self.is_taken = True
