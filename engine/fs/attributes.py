"""Open directories, and owner, mode, times and xattrs of what is open. Sync."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.fs.kernel import open_beneath

__all__ = ["beneath", "copy_attributes", "folder_descriptor", "keeping_time"]


@contextmanager
def folder_descriptor(path: Path) -> Iterator[int]:
    """Give a descriptor of a folder of ours for the length of a block."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def beneath(root: int, path: bytes) -> Iterator[int]:
    """Give a descriptor of the directory at `path` below `root`, reached through no link."""
    folder = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def keeping_time(folder: int) -> Iterator[None]:
    """Give a directory its times back after the block made or removed names in it."""
    before = os.fstat(folder)
    try:
        yield
    finally:
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def copy_attributes(source: int, target: int) -> None:
    """Give the file or directory `target` owner, xattrs, mode and times of `source`.

    In this order: a change of owner clears capabilities and setuid bits. Overlay's own xattrs stay
    behind: they belong to a layer, not to a tree.
    """
    info = os.fstat(source)
    os.fchown(target, info.st_uid, info.st_gid)
    for key in os.listxattr(source):
        if not key.startswith("trusted.overlay."):
            os.setxattr(target, key, os.getxattr(source, key))
    os.fchmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
