"""What files and trees take up on disk, each inode counted once. Sync."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from engine.fs.attributes import folder_descriptor
from engine.fs.kernel import open_beneath

__all__ = ["BLOCK", "measure", "own", "taken"]

BLOCK = 512  # the unit of st_blocks, whatever the file system (stat(2))
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def measure(root: int) -> tuple[int, int]:
    """Return (bytes on disk, inodes) of all below the directory `root` is a descriptor of.

    What someone mounted in it does not count: only the folder below that, as an inode. Nor does what
    goes meanwhile.
    """
    size, inodes = 0, 0
    seen: set[int] = set()
    pending = [b""]
    while pending:
        path = pending.pop()
        try:
            folder = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            # A container may be at work there: a folder goes, or becomes something else.
            if error.errno not in {errno.EXDEV, *_GONE} or not path:
                raise
            inodes += error.errno == errno.EXDEV
            continue
        try:
            if path:
                size += os.fstat(folder).st_blocks * BLOCK
                inodes += 1
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(os.path.join(path, os.fsencode(entry.name)))
                        continue
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if info.st_nlink > 1:
                        if info.st_ino in seen:
                            continue
                        seen.add(info.st_ino)
                    size += info.st_blocks * BLOCK
                    inodes += 1
        finally:
            os.close(folder)
    return size, inodes


def own(path: Path) -> int:
    """Return the bytes of a file, or of a folder without what is in it; 0 if it is gone."""
    try:
        return path.lstat().st_blocks * BLOCK
    except FileNotFoundError:
        return 0


def taken(path: Path) -> tuple[int, int]:
    """Return (bytes, inodes) of a file, or of a folder with all that is in it; none if it is gone."""
    size = inodes = 0
    with suppress(FileNotFoundError, NotADirectoryError), folder_descriptor(path) as folder:
        size, inodes = measure(folder)
    return own(path) + size, inodes + os.path.lexists(path)
