"""What one layer may cost, counted over the whole of it: entries, folders, names kept, links followed.

Pure. The one place that counts; the bounds themselves are in `engine.limits`. What is about to be
written to the disk is told to whoever looks after that.
"""

from collections.abc import Callable, Iterable, Iterator

from engine import limits
from engine.errors import Refused

__all__ = ["BLOCK", "Budget"]

BLOCK = 4096
"""What the smallest file or folder takes on the file systems that people use."""


class Budget:
    """The counts of one layer; each method raises Refused once its bound is passed."""

    def __init__(self, take: Callable[[int], None] = lambda _size: None) -> None:
        """Begin to count; `take` is told of bytes before they are written, and may raise."""
        self._take = take
        self.entries = 0
        self._folders = 0
        self._names = 0
        self._steps = 0
        self._scattered = 0

    def taken(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the pieces of the archive, which become files."""
        for piece in pieces:
            self._take(len(piece))
            yield piece

    def entry(self) -> None:
        """Count an entry of the archive."""
        self.entries += 1
        if self.entries > limits.LAYER_ENTRIES:
            raise Refused(f"layer has over {limits.LAYER_ENTRIES} entries")

    def folder(self) -> None:
        """Count a folder, with or without an entry of its own."""
        self._take(BLOCK)  # of the archive it may have taken two bytes
        self._folders += 1
        if self._folders > limits.LAYER_DIRECTORIES:
            raise Refused(f"layer has over {limits.LAYER_DIRECTORIES} folders")

    def scattered(self, size: int) -> None:
        """Count what a sparse file takes on disk: a block for a byte here and there."""
        self._take(size)
        self._scattered += size
        if self._scattered > limits.LAYER:
            raise Refused(f"layer has sparse files that take over {limits.LAYER} bytes")

    def kept(self, count: int) -> None:
        """Count bytes of names and xattrs that stay in memory until the layer ends."""
        self._names += count
        if self._names > limits.LAYER_NAMES:
            raise Refused(f"layer has over {limits.LAYER_NAMES} bytes of names")

    def link_steps(self, count: int) -> None:
        """Count what links make us walk through."""
        self._steps += count
        if self._steps > limits.LAYER_LINK_STEPS:
            raise Refused(f"layer has links of over {limits.LAYER_LINK_STEPS} steps, all together")
