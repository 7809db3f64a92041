"""So many things at once, first come first served; who comes for one that is under way goes along.

Async.
"""

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

__all__ = ["Admission"]


@dataclass(slots=True, eq=False)
class _Place:
    """Those who wait for one thing."""

    count: int = 0
    admitted: trio.Event = field(default_factory=trio.Event)


class Admission:
    """Lets in those who come for `most` different things."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, _Place] = {}

    @asynccontextmanager
    async def admitted(self, key: Hashable) -> AsyncIterator[None]:
        """Wait to be let in for a thing, and be inside for the length of a block."""
        if key not in self._inside and (self._waiting or len(self._inside) >= self._most):
            await self._wait(key)
        else:
            self._inside[key] = self._inside.get(key, 0) + 1
        try:
            yield
        finally:
            self._leave(key)

    async def _wait(self, key: Hashable) -> None:
        place = self._waiting.setdefault(key, _Place())
        place.count += 1
        try:
            await place.admitted.wait()
        except trio.Cancelled:
            if place.admitted.is_set():
                self._leave(key)
            else:
                place.count -= 1
                if not place.count:
                    del self._waiting[key]
            raise

    def _leave(self, key: Hashable) -> None:
        self._inside[key] -= 1
        if not self._inside[key]:
            del self._inside[key]
        while self._waiting and len(self._inside) < self._most:
            first = next(iter(self._waiting))
            place = self._waiting.pop(first)
            self._inside[first] = place.count
            place.admitted.set()
