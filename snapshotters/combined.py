"""The layers below one that is being settled, as they combine: a tree of values, listed when asked.

Sync; one thread. A folder of the layers on disk is listed once, when something first stands at its
path; a layer that was settled before adds its own tree without being listed at all. So settling a chain
costs what its layers hold, not the product of their number and depth, and nothing is held open.
"""

from collections.abc import Sequence
from pathlib import Path

from engine.diff.layer import Attributes, path_of
from engine.fs.attributes import beneath, folder_descriptor
from snapshotters.attributes import read_attributes
from snapshotters.markers import Listing, Markers

__all__ = ["Combined", "CombinedFolder"]


class CombinedFolder:
    """One path at which some layer below has a folder.

    `shows` says what can be seen there, and whether it is a folder; it means something only while
    the folder itself can be seen. `buried` and `is_marked` tell of all layers, seen or not.
    """

    __slots__ = (
        "attributes",
        "buried",
        "depth",
        "folders",
        "is_marked",
        "name",
        "parent",
        "parts",
        "shows",
    )

    def __init__(self, parent: "CombinedFolder | None", name: bytes) -> None:
        self.parent = parent or self
        self.name = name
        self.depth: int = parent.depth + 1 if parent else 0
        self.attributes = Attributes()
        self.shows: dict[bytes, bool] = {}
        self.folders: dict[bytes, CombinedFolder] = {}
        self.buried: set[bytes] = set()
        self.is_marked = False
        self.parts: list[tuple[int, bool]] = []
        """Layers on disk that have the folder and are not listed yet, nearest first; whether it can
        be seen in them."""

    def below(self, name: bytes) -> "CombinedFolder":
        """Return the folder at a name, new if no layer has one there."""
        found = self.folders.get(name)
        if found is None:
            found = self.folders[name] = CombinedFolder(self, name)
        return found


class Combined:
    """What layers on disk, nearest first, show together."""

    def __init__(self, layers: Sequence[Path], markers: Markers) -> None:
        self._layers = layers
        self._markers = markers
        self.root = CombinedFolder(None, b"")
        self.root.parts = [(number, True) for number in range(len(layers))]

    def list(self, folder: CombinedFolder) -> None:
        """Make `shows` and what is buried known, from all layers on disk that have the folder."""
        parts, folder.parts = folder.parts, []
        is_first, is_seen = True, True
        decided: set[bytes] = set()
        for number, shows in parts:
            with (
                folder_descriptor(self._layers[number]) as root,
                beneath(root, path_of(folder)) as opened,
            ):
                listing = self._markers.read(opened)
                if shows and is_first:
                    folder.attributes = read_attributes(opened)
                    is_first = False
            self._add(folder, number, listing, decided if shows and is_seen else None)
            if listing.is_opaque:
                folder.is_marked = True
                is_seen = False
                if not self._markers.lowest_opaque_counts:
                    return

    def _add(
        self, folder: CombinedFolder, number: int, listing: Listing, decided: set[bytes] | None
    ) -> None:
        """Add what one layer has; `decided` names are those it can't add to, None means all."""
        keeps = self._markers.lowest_opaque_counts
        if keeps:
            folder.buried.update(listing.names)
        for name, is_folder in listing.names.items():
            shows = False
            if decided is not None and name not in decided:
                shows = is_folder
                folder.shows.setdefault(name, is_folder)
                if not is_folder:
                    decided.add(name)
            if is_folder and (shows or keeps):
                folder.below(name).parts.append((number, shows))
        if decided is not None:
            decided |= listing.whiteouts
