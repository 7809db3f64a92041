"""What is left on a disk, looked at while much is written: work ends before the disk is full.

Sync; one thread. Beside the error of one layer, a full disk would stop whatever else writes there.
"""

import os
from pathlib import Path

from engine.errors import ResourceExhausted
from engine.fs.durable import flush_file_system

__all__ = ["Room", "writers"]

_EVERY = 1 << 20  # bytes of an archive between two looks
_HEADER, _BLOCK = 512, 4096  # so little of an archive makes a file, which takes so much and an inode
_SHARE = 16  # of a small disk one such part stays free at most
_WRITERS = 8  # few layers are large, and the margin of more would be all that some disks have


def writers() -> int:
    """Return how many processes of ours write at once, at most: no more than there are processors."""
    return min(len(os.sched_getaffinity(0)), _WRITERS)


class Room:
    """The disk of `folder`, on which this process and others like it write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left = 0  # bytes until the next look
        # Each of them looks only so often.
        most_files = _EVERY // _HEADER * writers()
        self._bytes = most_files * (_BLOCK + _HEADER)
        self._inodes = 2 * most_files

    def take(self, size: int) -> None:
        """Say that `size` bytes are about to be written. ResourceExhausted if they are too many."""
        self._left -= size
        if self._left <= 0:
            self._look(size)
            self._left = _EVERY

    def _look(self, size: int) -> None:
        disk = os.statvfs(self._folder)
        if self._is_short(disk, size):
            # XFS takes five blocks and more for one that is still to be written back, and gives them
            # back then (xfs_bmap_worst_indlen): of small files that is most of what seems to be used.
            flush_file_system(self._folder)
            disk = os.statvfs(self._folder)
        if self._is_short(disk, size):
            free = disk.f_bavail * disk.f_frsize
            raise ResourceExhausted(
                f"{self._folder}: no space left on the device but {free >> 20} MiB, too few to go on; "
                "free some (try `lamina gc`)"
            )
        # A file system that makes inodes as they are needed says that there are none (btrfs).
        if disk.f_files and disk.f_favail < min(self._inodes, disk.f_files // _SHARE):
            raise ResourceExhausted(
                f"{self._folder}: no inodes left on the device but {disk.f_favail}, too few to go on; "
                "remove some files (try `lamina gc`)"
            )

    def _is_short(self, disk: os.statvfs_result, size: int) -> bool:
        free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        return free - size < min(self._bytes, whole // _SHARE)
