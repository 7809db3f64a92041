"""Lets transactions in, and holds them up while their file is mapped anew.

Sync; safe from any thread. One that is inside may enter again, so that nobody waits for himself.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate"]


class Gate:
    """Counts who is inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False
        self._mine = threading.local()

    def inside(self) -> "_Inside":
        """Be inside for the length of a block, which `alone` waits for."""
        return _Inside(self)

    def _enter(self) -> None:
        depth: int = getattr(self._mine, "depth", 0)
        with self._changed:
            while self._closed and not depth:
                self._changed.wait()
            self._inside += 1
        self._mine.depth = depth + 1

    def _leave(self) -> None:
        self._mine.depth -= 1
        with self._changed:
            self._inside -= 1
            if self._closed and not self._inside:
                self._changed.notify_all()

    @contextmanager
    def alone(self, seconds: float) -> Iterator[bool]:
        """Give whether nobody is inside, and let nobody in during the block if so."""
        end = time.monotonic() + seconds
        with self._changed:
            mine = self._changed.wait_for(lambda: not self._closed, seconds)
            self._closed = True
            free = mine and self._changed.wait_for(
                lambda: not self._inside, max(0, end - time.monotonic())
            )
        try:
            yield free
        finally:
            if mine:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()


class _Inside:
    """A block that is inside: a class, as each transaction has several, and a generator takes longer."""

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate._enter()

    def __exit__(self, *_: object) -> None:
        self._gate._leave()
