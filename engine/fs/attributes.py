"""Directories by descriptor. Sync."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.fs.kernel import open_beneath

__all__ = ["beneath", "folder_descriptor"]


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
