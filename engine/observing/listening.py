"""Events of a store as they happen: what this process does to images, content and snapshots.

Async; they come from any thread. Each is told once its transaction is durable, in the order of commits.
Who reads slowly holds nobody up: beyond a bound the oldest are dropped, and he is told how many.
"""

import threading
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import msgspec
import trio

from engine import limits
from engine.kv.environment import Environment
from engine.kv.schema import now
from engine.metadata.events import Event, events
from engine.observing.waking import Bell

__all__ = ["Listening", "Missed"]


class Missed(msgspec.Struct, frozen=True):
    """So many events before the next one were dropped: look at what there is instead."""

    count: int


class Listening:
    """The events of one namespace, from the beginning of a block on; iterate over it within.

    with e.events() as events:
        async for event in events: ...
    """

    def __init__(self, meta: Environment, namespace: str) -> None:
        """Listen to the records `meta`, in the block to come."""
        self._meta = meta
        self._namespace = namespace
        self._lock = threading.Lock()
        self._left: deque[Event] = deque()
        self._missed = 0
        self._bell = Bell()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Begin."""
        self._open.enter_context(self._meta.heard_by(self._hear))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        self._open.close()

    def __aiter__(self) -> Self:
        """Iterate over what was not read yet, and what comes."""
        return self

    async def __anext__(self) -> Event | Missed:
        """Wait for the next event."""
        await trio.lowlevel.checkpoint()
        while True:
            with self._bell.heard() as news:
                if (found := self._next()) is not None:
                    return found
                await news.wait()

    def _next(self) -> Event | Missed | None:
        with self._lock:
            if self._missed:
                missed, self._missed = Missed(self._missed), 0
                return missed
            return self._left.popleft() if self._left else None

    def _hear(self, changes: list[Any]) -> None:
        found = [event for event in events(changes, now()) if event.namespace == self._namespace]
        with self._lock:
            self._left.extend(found)
            while len(self._left) > limits.EVENTS:
                self._left.popleft()
                self._missed += 1
        if found:
            self._bell.ring()
