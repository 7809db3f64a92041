"""Directories by descriptor, and their times kept. Sync."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.fs.kernel import open_beneath

__all__ = ["beneath", "folder_descriptor", "keeping_time"]


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
