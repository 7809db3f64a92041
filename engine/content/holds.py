"""Who reads a blob or writes an ingest holds its bytes: a lock on one byte of a file, at its number.

Sync; safe from any thread. Each reader of a process has a lock of its own, which the kernel drops with
the process (`engine.fs.locks`). Whoever deletes bytes has dropped their record before: a reader or
writer locks first and looks at the record then, so that one of the two sees the other.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from engine.errors import os_errors
from engine.fs.locks import lock_byte, locked_byte

__all__ = ["Holds", "release"]

_NOT_WRITTEN = {errno.EROFS, errno.EACCES, errno.EPERM}


class Holds:
    """The file of a store."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def take(self, number: int) -> int:
        """Hold the bytes of a number until the descriptor that is returned is closed.

        It is -1 where there is no file and none can be made: who cannot write here deletes nothing here.
        """
        with os_errors(f"file {self._file}"):
            opened = self._open()
            if opened >= 0:
                try:
                    lock_byte(opened, number, alone=False)
                except BaseException:
                    release(opened)
                    raise
            return opened

    def free(self, numbers: Iterable[int]) -> list[int]:
        """Return those of some numbers that no process holds. Only asks: it keeps no reader out."""
        with os_errors(f"file {self._file}"):
            opened = self._open()
            try:
                return [n for n in numbers if opened < 0 or locked_byte(opened, n, 1) is None]
            finally:
                release(opened)

    def _open(self) -> int:
        """Open the file. One who only reads makes it too, in a store that nobody opened to write since
        there is such a file: else he would hold nothing when someone does.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self._file, flags)
        except FileNotFoundError:
            pass
        try:
            return os.open(self._file, flags | os.O_CREAT, 0o600)
        except OSError as error:
            if error.errno in _NOT_WRITTEN:
                return -1
            raise


def release(hold: int) -> None:
    """Let go of what was taken."""
    if hold >= 0:
        os.close(hold)
