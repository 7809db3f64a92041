"""Makes what was written durable: the one place that asks the kernel for it, LMDB's own files aside.

Sync. The order of these steps is that of docs/on-disk.md; `tests/durability.py` records them.
"""

import os
from pathlib import Path

from engine.fs.attributes import folder_descriptor
from engine.fs.kernel import syncfs

__all__ = ["flush", "flush_file_system", "flush_names"]


def flush(file: int) -> None:
    """Return when the bytes of an open file are durable."""
    os.fsync(file)


def flush_names(*folders: Path) -> None:
    """Return when the names in each folder are durable, and what the folder itself is."""
    for folder in folders:
        with folder_descriptor(folder) as opened:
            os.fsync(opened)


def flush_file_system(folder: Path) -> None:
    """Return when everything written to the file system of `folder` is durable."""
    with folder_descriptor(folder) as opened:
        syncfs(opened)
