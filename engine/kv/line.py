"""Lines of those who wait for one thing, first come first served: of processes, and of threads.

Sync. A line of processes is made of locks alone, which the kernel drops with their process: each in it
holds the byte of a file that comes after all that are held (`engine.fs.locks`). Nothing is written,
so that a full disk stands in nobody's way.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.fs.locks import lock, lock_byte, locked_byte, unlock, unlock_byte

__all__ = ["PlaceInLine", "ProcessLine", "ThreadLine"]


class ProcessLine:
    """A line over all processes, in which this one stands once at a time."""

    def __init__(self, file: Path) -> None:
        """Open `file`, making it if need be."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(file, flags, 0o600)

    def is_wanted(self) -> bool:
        """Say whether another process stands in it."""
        return locked_byte(self._file, 0, 0) is not None

    @contextmanager
    def standing(self) -> Iterator["PlaceInLine"]:
        """Stand in the line for the length of a block."""
        place = PlaceInLine(self._file)
        try:
            yield place
        finally:
            place.leave()

    def close(self) -> None:
        """Let go of the file; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class PlaceInLine:
    """A place in a line."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._number: int | None = None

    def is_first(self) -> bool:
        """Say whether everyone who came before is gone."""
        if self._number is None:
            self._number = self._take()
        # Only the one before is looked at: if he gave up, those before him are passed.
        return self._number == 0 or (
            self._number is not None and locked_byte(self._file, self._number - 1, 1) is None
        )

    def _take(self) -> int | None:
        """Go to the end of the line; None where another is just doing that."""
        if not lock(self._file, alone=True):
            return None
        try:
            end = 0
            while (held := locked_byte(self._file, end, 0)) is not None:
                end = held + 1
            lock_byte(self._file, end, alone=True)
            return end
        finally:
            unlock(self._file)

    def leave(self) -> None:
        """Let who comes next be first; may be called again."""
        if self._number is not None:
            unlock_byte(self._file, self._number)
            self._number = None


class ThreadLine:
    """A lock that the threads of a process get in the order in which they ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, seconds: float) -> bool:
        """Wait so long for the lock at most; say whether it was had."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            had = mine.acquire(timeout=seconds)
        except BaseException:  # a signal's
            if not self._left(mine):
                self.release()
            raise
        return had or not self._left(mine)

    def is_wanted(self) -> bool:
        """Say whether a thread waits."""
        return bool(self._waiting)

    def _left(self, mine: threading.Lock) -> bool:
        """Go out of the line; False if the lock was handed over by then."""
        with self._lock:
            if mine not in self._waiting:
                return False
            self._waiting.remove(mine)
            return True

    def release(self) -> None:
        """Hand the lock to who waits longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
