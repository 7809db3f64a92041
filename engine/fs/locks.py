"""Locks on whole files (flock(2)) and on single bytes of them (F_OFD_SETLK, fcntl(2)), and who has them.

Sync. Both belong to an open file description: each one who opened the file has locks of his own, and the
kernel drops them with the last descriptor, so with the process.
"""

import fcntl
import os
import struct
from pathlib import Path

__all__ = ["holders", "lock", "lock_byte", "locked_byte", "named", "unlock", "unlock_byte"]

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


def lock(file: int, *, alone: bool) -> bool:
    """Lock an open file, alone or with others, if that can be had at once; say whether."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    """Give back what `lock` took."""
    fcntl.flock(file, fcntl.LOCK_UN)


def lock_byte(file: int, number: int, *, alone: bool) -> None:
    """Lock a byte, there or not; alone in a file that is opened to write. OSError if it is taken."""
    _set(file, fcntl.F_WRLCK if alone else fcntl.F_RDLCK, number)


def unlock_byte(file: int, number: int) -> None:
    """Give back what `lock_byte` took."""
    _set(file, fcntl.F_UNLCK, number)


def _set(file: int, kind: int, number: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))


def locked_byte(file: int, start: int, length: int) -> int | None:
    """Return a byte of a part of a file that someone else has locked; length 0 is up to the end."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, found, _, _ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(found)


def holders(file: int) -> list[int]:
    """Return the processes that have a lock on an open file, as far as /proc/locks shows them here."""
    inode = os.fstat(file).st_ino
    found = set()
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()  # proc_locks(5); one that waits has an arrow before its kind
        if fields[1:3] == ["FLOCK", "ADVISORY"] and fields[5].endswith(f":{inode}"):
            found.add(int(fields[4]))
    return sorted(found - {0, -1})


def named(pids: list[int]) -> str:
    """Return who `holders` are, for a message."""
    if not pids:
        return "a process that cannot be seen from here"
    return ("process " if len(pids) == 1 else "processes ") + ", ".join(map(str, pids))
