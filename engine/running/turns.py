"""Turns by key: of those who want the same, who came first goes first, one at a time.

Async.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["Turns"]


class Turns:
    """A queue for each key, as long as anybody is in it."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._locks: dict[str, trio.Lock] = {}

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Have a turn, once all who came before have had theirs."""
        lock = self._locks.setdefault(key, trio.Lock())  # which is fair
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(key) is lock:
                del self._locks[key]
