"""Descriptors of the folders of one tree, opened on the way down and a bounded number held.

Sync; one thread. A folder is opened below its parent's descriptor by its own name and through no
link, so the cost of a step does not grow with its depth.
"""

import os
from collections import OrderedDict
from typing import Self

from engine.diff.layer import Place
from engine.fs.kernel import open_beneath

__all__ = ["FOLDER", "OpenFolders", "WatchedFolders"]

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD = 128
_WAY = 64  # of one way down: a deep tree must not use up the process's descriptors


class OpenFolders:
    """Opens folders below the directory `root` is a descriptor of, which stays the caller's."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: OrderedDict[Place, int] = OrderedDict()

    def get(self, place: Place) -> int:
        """Return a descriptor that is good until the next call but one of `trim`."""
        if not place.depth:
            return self._root
        held = self._open.get(place)
        if held is not None:
            self._open.move_to_end(place)
            return held
        way = [place]
        while way[-1].parent.depth and way[-1].parent not in self._open:
            way.append(way[-1].parent)
        return self._descend(self._open.get(way[-1].parent, self._root), way)

    def _descend(self, folder: int, way: list[Place]) -> int:
        """Open the places of `way`, the last first, and keep the lowest of them open."""
        passing = -1
        try:
            for left, place in zip(range(len(way) - 1, -1, -1), reversed(way), strict=True):
                folder = self._step(folder, place.name)
                if passing >= 0:
                    os.close(passing)
                passing = folder if left >= _WAY else -1
                if passing < 0:
                    self._open[place] = folder
        except BaseException:
            if passing >= 0:
                os.close(passing)
            raise
        return folder

    def _step(self, folder: int, name: bytes) -> int:
        return os.open(name, FOLDER, dir_fd=folder)

    def trim(self) -> None:
        """Close the folders used longest ago; between two pieces of work, which hold some open."""
        while len(self._open) > _HELD:
            os.close(self._open.popitem(last=False)[1])

    def drop(self, place: Place) -> None:
        """Close one folder, if it is open."""
        held = self._open.pop(place, None)
        if held is not None:
            os.close(held)

    def places(self) -> list[Place]:
        """Return the folders that are open."""
        return list(self._open)

    def close(self) -> None:
        """Close all; may be called again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WatchedFolders(OpenFolders):
    """The same for a tree that others may have changed: what is mounted in it is not entered."""

    def _step(self, folder: int, name: bytes) -> int:
        return open_beneath(folder, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
