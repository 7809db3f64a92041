"""A layer is made by one process at a time: a lock on one byte of a file, at a number made of its name.

Sync. The kernel drops it with the process, so that nobody waits for a dead one (`engine.fs.locks`). Two
names can have one number, one time in 2**62: then one layer waits for the other, no more.
"""

import os
from hashlib import blake2b
from pathlib import Path

from engine.errors import os_errors
from engine.fs.locks import lock_byte

__all__ = ["LayerLocks"]


class LayerLocks:
    """The file of a store."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def take(self, *name: str) -> int:
        """Lock a name until the descriptor that is returned is closed; -1 if another has it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with os_errors(f"file {self._file}"):
            opened = os.open(self._file, flags, 0o600)
            try:
                lock_byte(opened, _number(name), alone=True)
            except BlockingIOError:
                os.close(opened)
                return -1
            except BaseException:
                os.close(opened)
                raise
            return opened


def _number(name: tuple[str, ...]) -> int:
    digest = blake2b("\0".join(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
