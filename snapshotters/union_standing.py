"""How a layer of a union stands on those below it, held against what is on disk.

Sync. What settling would do to the layer is worked out once more and compared instead of done: markers,
and the attributes of folders that the layer only implies.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from engine.diff.compare import How
from engine.diff.layer import Attributes, Folder, folders, path_of
from snapshotters.combined import Combined
from snapshotters.comparing import Discrepancy
from snapshotters.descriptors import WatchedFolders
from snapshotters.differing import attributes_differ
from snapshotters.markers import Markers
from snapshotters.union import Noted, Settling

__all__ = ["UnionStanding"]


class UnionStanding:
    """Compares the folders of a layer with what settling would make of them."""

    def __init__(self, markers: Markers) -> None:
        self._markers = markers

    def __call__(
        self, tree: WatchedFolders, root: Folder, below: Sequence[Path]
    ) -> Iterator[Discrepancy]:
        """Yield what differs."""
        noted = Noted()
        with closing(Combined(tuple(below), self._markers)) as combined:
            keeps = self._markers.lowest_opaque_counts
            Settling(noted, combined, lowest_opaque_counts=keeps).run(root)
        for folder in folders(root):
            tree.trim()
            try:
                opened = tree.get(folder)
            except OSError:  # it is told of as missing
                continue
            yield from self._attributes(opened, folder, noted)
            yield from self._names(opened, folder, noted)

    @staticmethod
    def _attributes(opened: int, folder: Folder, noted: Noted) -> Iterator[Discrepancy]:
        is_implied = folder.attributes is None and bool(folder.depth)
        wanted = folder.attributes if folder.depth else None
        attributes = wanted or noted.inherited.get(folder, Attributes())
        found = attributes_differ(opened, attributes)
        if found:
            yield Discrepancy(path_of(folder), b"", How.CHANGED, "; ".join(found), is_implied)

    def _names(self, opened: int, folder: Folder, noted: Noted) -> Iterator[Discrepancy]:
        listing = self._markers.read(opened)
        path = path_of(folder)
        for name in sorted(listing.names.keys() - folder.names.keys()):
            yield Discrepancy(path, name, How.ADDED)
        hidden = noted.hidden.get(folder, set())
        for name in sorted(hidden - listing.whiteouts):
            yield Discrepancy(path, name, How.MISSING, "what hides it of the layers below", True)
        for name in sorted(listing.whiteouts - hidden):
            yield Discrepancy(path, name, How.ADDED, "what would hide it of the layers below", True)
        if listing.is_opaque != (folder in noted.covered):
            how = How.ADDED if listing.is_opaque else How.MISSING
            yield Discrepancy(path, b"", how, "the mark that hides all below", True)
