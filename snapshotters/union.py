"""What overlay and aufs share: layers in folders of their own, combined when they are mounted.

Sync. What an applied layer asks of the layers below becomes markers and attributes when it is settled
on them. Whiteouts of what is not there are not made: they would show where a single layer is
bind-mounted.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec

from engine.diff.layer import Attributes, Folder, path_of
from engine.fs.attributes import folder_descriptor
from engine.kv.schema import Snapshot
from engine.mount import Mount
from engine.snapshots import Kind, Usage
from snapshotters.asking import asked, asks_of
from snapshotters.attributes import changing, give_attributes
from snapshotters.base import BaseSnapshotter
from snapshotters.combined import Combined, CombinedFolder
from snapshotters.descriptors import OpenFolders
from snapshotters.markers import Markers
from snapshotters.remaking import remake
from snapshotters.sealing import Settlement, Unsettled

__all__ = ["Hand", "Noted", "SettleUnion", "Settling", "UnionSnapshotter"]


@dataclass(frozen=True, slots=True)
class _Step:
    """A folder of the layer, and what the layers below have at its path."""

    folder: Folder
    below: CombinedFolder
    is_seen: bool
    """Whether it shows there, as a folder."""
    is_covered: bool
    """Whether the layer hides all of it, further up."""


class Hand(Protocol):
    """What carries out what settling a layer comes to."""

    def cover(self, folder: Folder) -> None:
        """Mark a folder as hiding all that the layers below have in it."""

    def hide(self, folder: Folder, names: AbstractSet[bytes]) -> None:
        """Hide names of the layers below in a folder."""

    def inherit(self, folder: Folder, attributes: Attributes) -> None:
        """Give a folder that the layer only implies the attributes that it has below."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A hand that notes what settling comes to, for another to carry it out or to compare it."""

    covered: dict[Folder, None] = field(default_factory=dict)
    hidden: dict[Folder, set[bytes]] = field(default_factory=dict)
    inherited: dict[Folder, Attributes] = field(default_factory=dict)

    def cover(self, folder: Folder) -> None:
        """Note it."""
        self.covered[folder] = None

    def hide(self, folder: Folder, names: AbstractSet[bytes]) -> None:
        """Note them."""
        self.hidden.setdefault(folder, set()).update(names)

    def inherit(self, folder: Folder, attributes: Attributes) -> None:
        """Note them."""
        self.inherited[folder] = attributes

    def carry_out(self, hand: Hand) -> None:
        """Have a hand do what was noted."""
        for folder in self.covered:
            hand.cover(folder)
        for folder, names in self.hidden.items():
            hand.hide(folder, names)
        for folder, attributes in self.inherited.items():
            hand.inherit(folder, attributes)

    def marks(self) -> bytes:
        """Return what stands for all that was noted."""
        noted = (
            sorted(path_of(folder) for folder in self.covered),
            sorted((path_of(folder), sorted(names)) for folder, names in self.hidden.items()),
            sorted((path_of(folder), given) for folder, given in self.inherited.items()),
        )
        return sha256(msgspec.msgpack.encode(noted)).digest()


class _Making:
    """Makes markers and gives attributes; `made` counts the inodes of markers."""

    def __init__(self, opened: OpenFolders, markers: Markers) -> None:
        self._opened = opened
        self._markers = markers
        self.made = 0

    @contextmanager
    def _changing(self, folder: Folder) -> Iterator[int]:
        self._opened.trim()
        opened = self._opened.get(folder)
        with changing(opened):
            yield opened

    def cover(self, folder: Folder) -> None:
        with self._changing(folder) as opened:
            self.made += self._markers.make_opaque(opened)

    def hide(self, folder: Folder, names: AbstractSet[bytes]) -> None:
        with self._changing(folder) as opened:
            for name in sorted(names):
                self._markers.make_whiteout(opened, name)
        self.made += len(names)

    def inherit(self, folder: Folder, attributes: Attributes) -> None:
        self._opened.trim()
        give_attributes(self._opened.get(folder), attributes, folder.name)


class Settling:
    """One layer on top of what `combined` knows: what there is to do about that is told to `hand`."""

    def __init__(self, hand: Hand, combined: Combined, *, lowest_opaque_counts: bool) -> None:
        self._hand = hand
        self._combined = combined
        self._lowest_counts = lowest_opaque_counts

    def run(self, root: Folder) -> None:
        """Make markers and give attributes, folder by folder, and add the layer to `combined`."""
        pending = [_Step(root, self._combined.root, True, False)]
        while pending:
            step = pending.pop()
            self._learn(step.below, is_seen=step.is_seen)
            if not step.folder.depth:
                _settle_opaque_root(step)
            self._mark(step)
            self._inherit(step)
            pending += _add(step, keeps=self._lowest_counts)

    def _learn(self, below: CombinedFolder, *, is_seen: bool) -> None:
        if below.parts and (is_seen or self._lowest_counts):
            self._combined.learn(below)
        if not is_seen:
            below.shows = {}
            if not self._lowest_counts:
                # What is hidden has no say any more, also if a folder stands there again later.
                below.parts, below.folders = (), {}

    def _mark(self, step: _Step) -> None:
        if step.is_covered:
            return
        if step.folder.depth and self._has_to_cover(step):
            self._cover(step.folder, step.below)
        elif not step.folder.is_opaque:
            self._hide(step.folder, step.below, step.folder.hidden & step.below.shows.keys())

    def _has_to_cover(self, step: _Step) -> bool:
        if self._lowest_counts:
            return (step.folder.is_opaque or not step.is_seen) and bool(step.below.buried)
        return step.folder.is_opaque and step.is_seen

    def _cover(self, folder: Folder, below: CombinedFolder) -> None:
        """Hide all that the layers below have in a folder."""
        pending = [(folder, below)]
        while pending:
            folder, below = pending.pop()
            if below.parts:
                self._combined.learn(below)
            if not (below.is_marked and self._lowest_counts):
                self._hand.cover(folder)
                below.is_marked = True
                continue
            self._hide(folder, below, below.buried - folder.names.keys())
            for name, node in folder.names.items():
                if isinstance(node, Folder) and name in below.folders:
                    pending.append((node, below.folders[name]))

    def _hide(self, folder: Folder, below: CombinedFolder, names: AbstractSet[bytes]) -> None:
        if not names:
            return
        self._hand.hide(folder, names)
        # Hidden by name, whatever is marked: no layer above has to do it again.
        below.buried -= names
        for name in names:
            below.folders.pop(name, None)

    def _inherit(self, step: _Step) -> None:
        """Give a folder that the layer only implies what the same folder has below."""
        folder, below = step.folder, step.below
        if folder.attributes is not None or not folder.depth:
            below.attributes = folder.attributes or Attributes()
        elif not step.is_seen:
            below.attributes = Attributes()
        elif below.attributes != Attributes():
            self._hand.inherit(folder, below.attributes)


def _settle_opaque_root(step: _Step) -> None:
    """Union mounts merge their roots whatever is marked there: hide its names one by one."""
    root = step.folder
    if root.is_opaque:
        root.is_opaque = False
        for name in step.below.shows:
            own = root.names.get(name)
            if isinstance(own, Folder):
                own.is_opaque = True
            elif own is None:
                root.hide(name)


def _add(step: _Step, *, keeps: bool) -> Iterator[_Step]:
    """Add a folder of the layer to what shows from now on; yield the steps for those in it."""
    folder, below = step.folder, step.below
    covers = step.is_covered or folder.is_opaque
    seen_before = below.shows
    if covers:
        below.shows = {}
    for name in folder.hidden:
        below.shows.pop(name, None)
    if keeps:
        below.bury(folder.names)
    for name, node in folder.names.items():
        is_folder = isinstance(node, Folder)
        was_folder = seen_before.get(name, False)
        below.shows[name] = is_folder
        if isinstance(node, Folder):
            yield _Step(node, below.below(name), was_folder, covers)


class SettleUnion:
    """Settles layers of a union; what the last one stood on is remembered for those on top of it."""

    def __init__(self, markers: Markers) -> None:
        self._markers = markers
        self._known: tuple[tuple[Path, ...], Combined] | None = None

    def __call__(self, below: Sequence[Path], layers: Iterable[Unsettled]) -> Iterator[Settlement]:
        """Settle layers, each on the one before it, the first on `below`."""
        known, self._known = self._known, None  # until all went well
        chain = tuple(below)
        combined = known[1] if known and known[0] == chain else Combined(chain, self._markers)
        try:
            for layer in layers:
                settlement = self._as_twin(layer, combined, chain)
                if layer.twin is not None:
                    # It may have learnt a part of the layer; and what stands already is on disk.
                    combined.close()
                    there = (layer.twin.tree, *chain) if settlement else chain
                    combined = Combined(there, self._markers)
                settlement = settlement or self._settle(layer, combined)
                chain = (layer.twin.tree if layer.twin and settlement.is_twin else layer.tree, *chain)
                yield settlement
        finally:
            combined.close()
        self._known = (chain, combined)

    def _as_twin(self, layer: Unsettled, combined: Combined, below: Sequence[Path]) -> Settlement | None:
        """Settle a layer by having the tree of its twin, if that comes to the same."""
        twin = layer.twin
        # Nothing can be mounted with one folder twice (overlay says ELOOP, aufs EINVAL).
        if twin is None or twin.tree in below:
            return None
        found = twin.settled
        # Where a lower mark counts, what a layer asks depends on all that it holds.
        is_short = found.asks and not self._markers.lowest_opaque_counts
        marks = self._noted(asked(found.asks) if is_short else layer.outline.root, combined).marks()
        if marks != found.marks:
            return None
        return Settlement(Usage(found.size, found.inodes), marks, is_twin=True)

    def _noted(self, root: Folder, combined: Combined) -> Noted:
        noted = Noted()
        Settling(noted, combined, lowest_opaque_counts=self._markers.lowest_opaque_counts).run(root)
        return noted

    def _settle(self, layer: Unsettled, combined: Combined) -> Settlement:
        outline, twin = layer.outline, layer.twin
        asks = twin.settled.asks if twin else asks_of(outline.root)  # before settling changes it
        noted = self._noted(outline.root, combined)
        if twin is not None:
            remake(twin.tree, layer.tree, outline.root)
        with folder_descriptor(layer.tree) as root, OpenFolders(root) as opened:
            making = _Making(opened, self._markers)
            noted.carry_out(making)
        return Settlement(Usage(outline.size, outline.inodes + making.made), noted.marks(), asks)


class UnionSnapshotter(BaseSnapshotter):
    """A snapshotter whose snapshots are layers; subclasses say how they are marked and mounted."""

    @abstractmethod
    def _union(self, layers: Sequence[Path], tree: Path, *, writable: bool) -> Mount:
        """Return the mount of `layers`, nearest first, below a snapshot's own `tree` if writable."""

    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        tree = self._tree(record)
        is_active = record.kind == Kind.ACTIVE
        if below and (is_active or len(below) > 1):
            return [self._union(below, tree, writable=is_active)]
        options = ["rbind", "rw" if is_active else "ro"]
        return [Mount(type="bind", source=str(below[0] if below else tree), options=options)]
