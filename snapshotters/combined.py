"""The layers below one that is being settled, as they combine: a tree of values, listed when asked.

Sync; one thread. A folder of the layers on disk is listed once, when something first stands at its
path; a layer that was settled before adds its own tree without being listed at all. So settling a chain
costs what its layers hold, not the product of their number and depth. One descriptor is held for each
layer.
"""

import os
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from engine.diff.layer import Attributes
from snapshotters.attributes import read_attributes
from snapshotters.descriptors import FOLDER
from snapshotters.markers import Listing, Markers

_NOTHING: frozenset[bytes] = frozenset()

__all__ = ["Combined", "CombinedFolder"]


class CombinedFolder:
    """One path at which some layer below has a folder.

    `shows` says what can be seen there, and whether it is a folder; it means something only while
    the folder itself can be seen. `buried` are the names that an opaque mark of an upper layer may not
    hide, as aufs has it: all that no whiteout hides by name. `is_marked` tells of any layer.
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
        self.buried: AbstractSet[bytes] = _NOTHING
        self.is_marked = False
        self.parts: Sequence[tuple[int, bool]] = ()
        """Layers on disk that have the folder and are not listed yet, nearest first; whether it can
        be seen in them."""

    def bury(self, names: Iterable[bytes]) -> None:
        """Add names that a layer has."""
        if not isinstance(self.buried, set):  # as in most folders, of which there may be many
            self.buried = set(self.buried)
        self.buried.update(names)

    def below(self, name: bytes) -> "CombinedFolder":
        """Return the folder at a name, new if no layer has one there."""
        found = self.folders.get(name)
        if found is None:
            found = self.folders[name] = CombinedFolder(self, name)
        return found


class Combined:
    """What layers on disk, nearest first, show together; closed when a settling ends."""

    def __init__(self, layers: Sequence[Path], markers: Markers) -> None:
        self._layers = layers
        self._markers = markers
        self._held: dict[int, tuple[CombinedFolder, int]] = {}
        self.root = CombinedFolder(None, b"")
        self.root.parts = [(number, True) for number in range(len(layers))]

    def learn(self, folder: CombinedFolder) -> None:
        """Make `shows` and what is buried known, from all layers on disk that have the folder."""
        parts, folder.parts = folder.parts, ()
        is_seen, is_first = True, True
        listings: list[tuple[int, bool, Listing]] = []
        for number, shows in parts:
            opened = self._open(number, folder)
            listing = self._markers.read(opened)
            if shows and is_first:
                folder.attributes = read_attributes(opened)
                is_first = False
            listings.append((number, shows and is_seen, listing))
            if listing.is_opaque:
                folder.is_marked = True
                is_seen = False
                if not self._markers.lowest_opaque_counts:
                    break
        self._combine(folder, listings)

    def _combine(self, folder: CombinedFolder, listings: list[tuple[int, bool, Listing]]) -> None:
        keeps = self._markers.lowest_opaque_counts
        marked = [at for at, (_, _, listing) in enumerate(listings) if listing.is_opaque]
        decided: set[bytes] = set()  # names that what is further down cannot add to, as it shows
        hidden: set[bytes] = set()  # those hidden by name, whatever mark counts
        for at, (number, is_seen, listing) in enumerate(listings):
            reaches = keeps and (not marked or at <= marked[-1])
            for name, is_folder in listing.names.items():
                shows = False
                if is_seen and name not in decided:
                    shows = is_folder
                    folder.shows.setdefault(name, is_folder)
                    if not is_folder:
                        decided.add(name)
                if is_folder and (shows or (reaches and name not in hidden)):
                    below = folder.below(name)
                    below.parts = below.parts if isinstance(below.parts, list) else []
                    below.parts.append((number, shows))
            if reaches:
                folder.bury(listing.names.keys() - hidden)
            hidden |= listing.whiteouts
            if is_seen:
                decided |= listing.whiteouts

    def _open(self, number: int, folder: CombinedFolder) -> int:
        """Return a descriptor of a layer's folder, reached from the one that was asked for before.

        Folders are asked for branch by branch: so the way is short, however deep they are. Nobody
        else moves folders of a layer, so that ".." is where the way came from.
        """
        if number not in self._held:
            self._held[number] = (self.root, os.open(self._layers[number], FOLDER))
        at, opened = self._held.pop(number)
        way: list[CombinedFolder] = []
        while at is not folder:
            if at.depth >= folder.depth:
                opened, at = _step(opened, b".."), at.parent
            else:
                way.append(folder)
                folder = folder.parent
        for place in reversed(way):
            opened, at = _step(opened, place.name), place
        self._held[number] = (at, opened)
        return opened

    def close(self) -> None:
        """Let go of the descriptors; what is known stays."""
        while self._held:
            os.close(self._held.popitem()[1][1])


def _step(opened: int, name: bytes) -> int:
    try:
        return os.open(name, FOLDER, dir_fd=opened)
    finally:
        os.close(opened)
