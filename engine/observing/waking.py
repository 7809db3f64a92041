"""News for tasks that wait for some, told from any thread.

Async; `ring` is for any thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

__all__ = ["Bell"]


class Bell:
    """Wakes those who wait; who does not wait costs nothing."""

    def __init__(self) -> None:
        """Begin with nobody who waits."""
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    @contextmanager
    def heard(self) -> Iterator[trio.Event]:
        """Give an event that is set by the next ring from now on."""
        mine = (trio.lowlevel.current_trio_token(), trio.Event())
        self._waiting.append(mine)
        try:
            yield mine[1]
        finally:
            with suppress(ValueError):  # it was rung
                self._waiting.remove(mine)

    def ring(self) -> None:
        """Wake all who wait now."""
        while self._waiting:
            with suppress(IndexError, trio.RunFinishedError):  # another thread was first
                token, event = self._waiting.pop()
                token.run_sync_soon(event.set)
