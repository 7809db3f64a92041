"""What one layer may cost, counted over the whole of it: entries, folders, names kept, links followed.

Pure. The one place that counts; the bounds themselves are in `engine.limits`.
"""

from engine import limits
from engine.errors import Refused

__all__ = ["Budget"]


class Budget:
    """The counts of one layer; each method raises Refused once its bound is passed."""

    def __init__(self) -> None:
        self.entries = 0
        self._folders = 0
        self._names = 0
        self._steps = 0

    def entry(self) -> None:
        """Count an entry of the archive."""
        self.entries += 1
        if self.entries > limits.LAYER_ENTRIES:
            raise Refused(f"layer has over {limits.LAYER_ENTRIES} entries")

    def folder(self) -> None:
        """Count a folder, with or without an entry of its own."""
        self._folders += 1
        if self._folders > limits.LAYER_DIRECTORIES:
            raise Refused(f"layer has over {limits.LAYER_DIRECTORIES} folders")

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
