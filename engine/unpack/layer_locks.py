"""A layer is made by one process at a time: a lock on one byte of a file, at a number made of its name.

Sync; safe from any thread. The kernel drops it with the process, so that nobody waits for a dead one
(`engine.fs.locks`). All locks of one process are on one descriptor, for images of many layers; among
themselves its threads are kept apart here. Two names can have one number, one time in 2**62: then one
layer waits for the other, no more.
"""

import os
import threading
from hashlib import blake2b
from pathlib import Path

from engine.errors import os_errors
from engine.fs.locks import lock_byte, unlock_byte

__all__ = ["LayerLocks"]


class LayerLocks:
    """The file of a store, open while any of its locks is had."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._opened = -1
        self._had: set[int] = set()
        self._alone = threading.Lock()

    def take(self, *name: str) -> bool:
        """Lock a name until `give_back`, if nobody has it; say whether."""
        number = _number(name)
        with self._alone, os_errors(f"file {self._file}"):
            if number in self._had:
                return False
            if not self._had:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._opened = os.open(self._file, flags, 0o600)
            try:
                lock_byte(self._opened, number, alone=True)
            except BlockingIOError:
                return False
            else:
                self._had.add(number)
                return True
            finally:
                self._close_unused()

    def give_back(self, *name: str) -> None:
        """Unlock a name that was taken."""
        number = _number(name)
        with self._alone:
            unlock_byte(self._opened, number)
            self._had.remove(number)
            self._close_unused()

    def _close_unused(self) -> None:
        if not self._had:
            os.close(self._opened)


def _number(name: tuple[str, ...]) -> int:
    digest = blake2b("\0".join(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
