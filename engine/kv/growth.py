"""Lets an LMDB file grow some way ahead of what is written to it.

Sync. To flush a file that a transaction made longer, a file system commits its journal, which costs
more than all else that the transaction does; to flush pages that are there it only writes them. Blocks
that are merely reserved would not do: they are marked as written in the journal too.
"""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["ROOM", "grow"]

ROOM = 1 << 18
"""Bytes that there should be for a transaction: a small one takes a few pages."""

_STEP = 1 << 20
_SHARE = 64  # of what is free one such part at most


def grow(file: Path, wanted: int) -> int:
    """Make `file` longer if it has not the bytes that are `wanted`, ROOM among them; return its length.

    LMDB must not write meanwhile. A file that cannot grow is not an error yet.
    """
    with suppress(OSError):
        size = file.stat().st_size
        if size >= wanted:
            return size
        opened = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            disk = os.fstatvfs(opened)
            if disk.f_bavail * disk.f_frsize > _STEP * _SHARE:
                start = max(size, wanted - ROOM)
                return start + os.pwrite(opened, bytes(_STEP), start)
        finally:
            os.close(opened)
    return 0
