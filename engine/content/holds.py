"""Who reads a blob holds its bytes: a lock on one byte of a file, at the offset that is its number.

Sync; safe from any thread. The lock belongs to an open file description (fcntl(2), F_OFD_SETLK), so
that each reader of a process has one of its own, and the kernel drops it with the process. Whoever
deletes bytes has dropped their record before: a reader locks first and looks at the record then, so
that one of the two sees the other.
"""

import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from engine.errors import os_errors

__all__ = ["Holds", "release"]

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


class Holds:
    """The file of a store."""

    def __init__(self, file: Path, *, readonly: bool) -> None:
        self._file = file
        self._readonly = readonly

    def take(self, number: int) -> int:
        """Hold the bytes of a number until the descriptor that is returned is closed.

        It is -1 where there is no file and none can be made: nobody deletes anything there.
        """
        with os_errors(f"file {self._file}"):
            opened = self._open(0 if self._readonly else os.O_CREAT)
            if opened >= 0:
                try:
                    fcntl.fcntl(opened, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, number))
                except BaseException:
                    release(opened)
                    raise
            return opened

    def free(self, numbers: Iterable[int]) -> list[int]:
        """Return those of some numbers that no process holds. Only asks: it keeps no reader out."""
        with os_errors(f"file {self._file}"):
            opened = self._open(0)
            try:
                return [number for number in numbers if opened < 0 or not _is_held(opened, number)]
            finally:
                release(opened)

    def _open(self, more: int) -> int:
        try:
            return os.open(self._file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | more, 0o600)
        except FileNotFoundError:
            return -1


def release(hold: int) -> None:
    """Let go of what was taken."""
    if hold >= 0:
        os.close(hold)


def _is_held(opened: int, number: int) -> bool:
    found = fcntl.fcntl(opened, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, number))
    kind: int = struct.unpack(_FLOCK, found)[0]
    return kind != fcntl.F_UNLCK


def _lock(kind: int, number: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, number, 1, 0)
