"""Who is at work: a process named so that a later one can tell whether it still runs.

Sync. A pid alone is not a name: it is used again, and another boot starts over.
"""

import os
from functools import cache
from pathlib import Path

import msgspec

__all__ = ["Owner", "is_alive", "myself"]


class Owner(msgspec.Struct, frozen=True):
    """A process: pid, start time in clock ticks since boot, boot ID, pid namespace."""

    pid: int
    started: int
    boot: str
    namespace: str


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@cache
def _namespace(_pid: int) -> str:
    return os.readlink("/proc/self/ns/pid")  # the inode number names the namespace


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Fields follow the name, which may hold spaces and parentheses (proc(5): starttime is 22nd).
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def myself() -> Owner:
    """Return the name of this process."""
    pid = os.getpid()
    return Owner(pid, _started(pid) or 0, _boot(), _namespace(pid))


def is_alive(owner: Owner) -> bool:
    """Say whether `owner` still runs; one in another pid namespace counts as running."""
    if owner.boot != _boot():
        return False
    if owner.namespace != _namespace(os.getpid()):
        return True
    return _started(owner.pid) == owner.started
