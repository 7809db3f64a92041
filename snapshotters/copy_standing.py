"""How a full copy stands on its parent, held against what is on disk.

Sync. Whatever the parent has and the layer does not hide must be here as it is there: both trees are
walked side by side, as when the copy was filled, and compared instead of copied, contents too.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from engine.diff.compare import How
from engine.diff.layer import Attributes, Folder, path_of
from engine.fs.attributes import folder_descriptor
from snapshotters.attributes import read_attributes
from snapshotters.comparing import Discrepancy
from snapshotters.descriptors import WatchedFolders
from snapshotters.differing import attributes_differ, look, twins_differ

__all__ = ["stand_on_parent"]


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """A folder of the copy; `own` is the layer's, None for one that only the parent has."""

    above: "_Place | None"
    name: bytes
    depth: int
    own: Folder | None
    is_below: bool
    """Whether the parent has it too."""
    is_covered: bool
    """Whether the layer hides all that the parent has in it."""

    @property
    def parent(self) -> "_Place":
        return self.above or self

    def child(self, name: bytes, own: Folder | None, *, is_below: bool) -> "_Place":
        covers = own is not None and (self.is_covered or own.is_opaque)
        return _Place(self, name, self.depth + 1, own, is_below, covers)


def stand_on_parent(tree: WatchedFolders, root: Folder, below: Sequence[Path]) -> Iterator[Discrepancy]:
    """Yield what differs in the tree of a copy of `below`'s first with the layer `root` on it."""
    with ExitStack() as inside:
        parents = None
        if below:
            opened = inside.enter_context(folder_descriptor(below[0]))
            parents = inside.enter_context(WatchedFolders(opened))
        yield from _Walk(tree, parents).run(root)


class _Walk:
    def __init__(self, tree: WatchedFolders, parents: WatchedFolders | None) -> None:
        self._tree = tree
        self._parents = parents
        self._links: dict[int, int] = {}  # inodes of the parent's to those of their copies

    def run(self, root: Folder) -> Iterator[Discrepancy]:
        top = _Place(None, b"", 0, root, self._parents is not None, root.is_opaque)
        pending = [top]
        while pending:
            place = pending.pop()
            self._tree.trim()
            try:
                opened = self._tree.get(place)
            except OSError:  # it is told of as missing
                continue
            source = None
            if place.is_below and self._parents is not None:
                self._parents.trim()
                source = self._parents.get(place)
            below = list(self._compare(place, opened, source))
            yield from (found for found in below if isinstance(found, Discrepancy))
            pending += (found for found in below if isinstance(found, _Place))

    def _compare(self, place: _Place, opened: int, source: int | None) -> Iterator[Discrepancy | _Place]:
        yield from _attributes(place, opened, source)
        names = place.own.names if place.own else {}
        here = set(map(os.fsencode, os.listdir(opened)))
        wanted = set(names)
        theirs = set(map(os.fsencode, os.listdir(source))) if source is not None else set()
        for name, node in names.items():
            if isinstance(node, Folder):
                info = look(source, name) if name in theirs else None
                is_below = info is not None and stat.S_ISDIR(info.st_mode)
                yield place.child(name, node, is_below=is_below)
        if source is not None and not place.is_covered:
            hidden = place.own.hidden if place.own else ()
            inherited = sorted(theirs - names.keys() - set(hidden))
            wanted.update(inherited)
            for name in inherited:
                yield from self._inherited(place, name, opened, source)
        for name in sorted(here - wanted):
            # What a parent lost is still here: only a whole one can tell.
            yield Discrepancy(path_of(place), name, How.ADDED, "", self._parents is not None)

    def _inherited(
        self, place: _Place, name: bytes, opened: int, source: int
    ) -> Iterator[Discrepancy | _Place]:
        """Compare what only the parent's tree has."""
        mine, theirs = look(opened, name), look(source, name)
        if mine is None or theirs is None:
            if theirs is not None:
                yield Discrepancy(path_of(place), name, How.MISSING, "", True)
            return
        if stat.S_ISDIR(theirs.st_mode) and stat.S_ISDIR(mine.st_mode):
            yield place.child(name, None, is_below=True)
            return
        found = twins_differ(opened, name, source, name)
        if not found and theirs.st_nlink > 1:
            first = self._links.setdefault(theirs.st_ino, mine.st_ino)
            if first != mine.st_ino and mine.st_nlink == 1:
                found.append("not the same file as its other names")
        if found:
            yield Discrepancy(path_of(place), name, How.CHANGED, "; ".join(found), True)


def _attributes(place: _Place, opened: int, source: int | None) -> Iterator[Discrepancy]:
    own = place.own
    is_inherited = own is None or (own.attributes is None and place.depth and source is not None)
    if is_inherited and source is not None:
        wanted = read_attributes(source)
    else:
        wanted = (own.attributes if own and place.depth else None) or Attributes()
    found = attributes_differ(opened, wanted)
    if found:
        detail = "; ".join(found)
        is_implied = own is None or (own.attributes is None and bool(place.depth))
        yield Discrepancy(path_of(place), b"", How.CHANGED, detail, is_implied)
