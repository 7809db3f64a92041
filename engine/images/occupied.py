"""What a store takes up in each of its places, in bytes and inodes: content, and each backend.

Sync. As the CRI's `ImageFsInfo` asks, often: each layer counts by what its record says, what can still
change is measured, and what no record knows. All of the root is in one of the places, so that together
they are what `du` says. Namespaces share all places.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.fs.usage import own, taken
from engine.kv.schema import SNAPSHOTS, Snapshot
from engine.root import Root
from engine.snapshots import Kind

__all__ = ["CONTENT", "Occupied", "occupied"]

CONTENT = "content"
"""What no backend has: blobs, records, and what is being deleted of either."""


class Occupied(msgspec.Struct, frozen=True):
    """What one place takes up."""

    name: str
    """`CONTENT`, or a backend's."""
    path: str
    bytes: int
    inodes: int


def occupied(root: Root) -> Iterator[Occupied]:
    """Yield what each place of a root takes up, content first."""
    others = [taken(path) for path in root.path.iterdir() if path != root.snapshots]
    size = sum(one[0] for one in others) + own(root.path) + own(root.snapshots)
    yield Occupied(CONTENT, str(root.path), size, sum(one[1] for one in others) + 2)
    for folder in sorted(path for path in root.snapshots.iterdir() if path.is_dir()):
        yield Occupied(folder.name, str(folder), *_backend(root, folder))


def _backend(root: Root, folder: Path) -> tuple[int, int]:
    layers = {
        str(record.id): record
        for record in SNAPSHOTS.walk(root.meta, folder.name)
        if isinstance(record, Snapshot) and record.kind == Kind.COMMITTED
    }
    size, inodes = own(folder), 1
    with os.scandir(folder) as entries:
        for entry in entries:
            record = layers.get(entry.name)
            found = _layer(folder / entry.name, record) if record else taken(folder / entry.name)
            size, inodes = size + found[0], inodes + found[1]
    return size, inodes


def _layer(folder: Path, record: Snapshot) -> tuple[int, int]:
    """Return what a layer takes up: as its record says, and what holds its tree."""
    size, inodes = own(folder) + record.size, 1 + record.inodes
    with suppress(FileNotFoundError, NotADirectoryError):  # it went, or is a file
        for beside in folder.iterdir():
            size, inodes = size + own(beside), inodes + 1
    return size, inodes
