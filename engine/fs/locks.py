"""Locks on whole files (flock(2)), and who has them.

Sync. The kernel drops them with their process.
"""

import fcntl
import os
from pathlib import Path

__all__ = ["holders", "lock", "named"]


def lock(file: int, *, alone: bool) -> bool:
    """Lock an open file, alone or with others, if that can be had at once; say whether."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
