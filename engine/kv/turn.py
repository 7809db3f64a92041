"""Whose turn it is to write: a lock taken before LMDB's own.

Sync; safe from any thread. LMDB waits for the writer before it without end, also for one that was
stopped, and nothing interrupts that wait. This one ends, and names who is waited for. Who asks first is
first: one that writes again and again, however short, lets in between whoever waits.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import Unavailable, os_errors
from engine.fs.locks import holders, lock, named, unlock
from engine.kv.line import PlaceInLine, ProcessLine, ThreadLine

__all__ = ["WAIT_S", "Turn"]

WAIT_S = 30.0
_TELL_S = 1.0  # after which the wait is told of
_PAUSE_S = 0.0002  # between two attempts, doubled up to
_LONGEST_PAUSE_S = 0.001
# After which nobody waits in line any more: one who was stopped there would stop all behind him.
_PATIENCE_S = 1.0

_log = logging.getLogger(__name__)


class Turn:
    """The turn of one LMDB file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(folder / "writer", flags, 0o600)
        try:
            self._line = ProcessLine(folder / "queue")
        except BaseException:
            os.close(self._file)
            raise
        self._threads = ThreadLine()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the turn for the length of a block. Unavailable if another keeps it too long."""
        end = time.monotonic() + WAIT_S
        if not self._threads.acquire(WAIT_S):
            raise self._too_long("another thread of this process")
        try:
            with os_errors(f"store {self._folder}"):
                # With nobody in line there is no need to stand in it, which takes longer than to lock.
                if self._line.is_wanted() or not lock(self._file, alone=True):
                    with self._line.standing() as place:
                        self._lock(place, end)
            try:
                yield
            finally:
                unlock(self._file)
        finally:
            self._threads.release()

    def is_wanted(self) -> bool:
        """Say whether anyone stands in line."""
        return self._threads.is_wanted() or self._line.is_wanted()

    def _lock(self, place: PlaceInLine, end: float) -> None:
        pause = _PAUSE_S
        told = end - WAIT_S + _TELL_S
        patience = time.monotonic() + _PATIENCE_S
        while not self._is_had(place, patience):
            if time.monotonic() > end:
                raise self._too_long(named(holders(self._file)))
            if time.monotonic() > told:
                told = end
                _log.warning("waiting for %s, which is writing to the store", named(holders(self._file)))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _is_had(self, place: PlaceInLine, patience: float) -> bool:
        if not place.is_first() and time.monotonic() < patience:
            return False
        return lock(self._file, alone=True)

    def _too_long(self, who: str) -> Unavailable:
        return Unavailable(
            f"store {self._folder}: {who} has been writing for over {WAIT_S:.0f} s; "
            "see whether it was stopped, then try again"
        )

    def close(self) -> None:
        """Let go of the file; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._line.close()
