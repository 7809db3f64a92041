"""What overlay and aufs share: layers in folders of their own, combined when they are mounted.

Sync. What an applied layer asked of its parents (`engine.diff.notes`) becomes markers and attributes
when it is settled on them. Whiteouts of what is not there are not
made: they would show where a single layer is bind-mounted.
"""

import os
import stat
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from engine.diff.notes import Notes
from engine.fs.attributes import beneath, copy_attributes, folder_descriptor, keeping_time
from engine.fs.kernel import open_beneath
from engine.kv.schema import Snapshot
from engine.mount import Mount
from engine.snapshots import Kind, Usage
from snapshotters.base import BaseSnapshotter
from snapshotters.markers import Markers

__all__ = ["UnionSnapshotter"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a path of the merged layers comes from: the layer's root, and what is there."""

    layer: int
    info: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.info.st_mode)


class _Hidden(Exception):
    """The path is hidden by the layer that was looked at."""


class _Below:
    """The merged view of the layers below, by lookup only."""

    def __init__(self, layers: Sequence[int], markers: Markers) -> None:
        self._layers = layers
        self._markers = markers

    def find(self, path: bytes) -> _Found | None:
        """Return what `path` is, or None where nothing shows."""
        for layer in self._layers:
            try:
                info = self._in_layer(layer, path.split(b"/"))
            except _Hidden:
                return None
            if info is not None:
                return _Found(layer, info)
        return None

    def _in_layer(self, layer: int, parts: Sequence[bytes]) -> os.stat_result | None:
        """Return what one layer has at a path, None if it says nothing of it."""
        is_opaque = False
        with ExitStack() as opened:
            folder = layer
            for position, part in enumerate(parts):
                if self._markers.is_whiteout(folder, part):
                    raise _Hidden
                try:
                    info = os.stat(part, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:
                    if is_opaque:
                        raise _Hidden from None
                    return None
                if position == len(parts) - 1:
                    return info
                if not stat.S_ISDIR(info.st_mode):
                    raise _Hidden
                folder = open_beneath(folder, part, _FOLDER)
                opened.callback(os.close, folder)
                is_opaque = is_opaque or self._markers.is_opaque(folder)
        return None

    def root_names(self) -> set[bytes]:
        """Return what shows in the root."""
        names = {os.fsencode(name) for layer in self._layers for name in os.listdir(layer)}
        return {name for name in names if self.find(name) is not None}


class _Settling:
    def __init__(self, layer: int, below: _Below, markers: Markers) -> None:
        self._layer = layer
        self._below = below
        self._markers = markers

    def settle(self, notes: Notes) -> None:
        hidden = list(notes.whiteouts)
        if b"" in notes.opaque:
            # Union mounts merge their roots whatever is marked there.
            hidden += [(b"", name) for name in sorted(self._below.root_names())]
        for path in notes.opaque:
            if path:
                self._make_opaque(path)
        # Folders that cover a lower name come first: within them there is nothing left to hide, and
        # a whiteout there would show.
        for parent, name in [place for place in hidden if not self._cover(*place)]:
            self._hide(parent, name)
        if not self._markers.files_hide_folders:
            self._hide_folders_under_files()
        for path in notes.implied:
            found = self._below.find(path)
            if found is not None and found.is_folder:
                with beneath(found.layer, path) as source, beneath(self._layer, path) as target:
                    copy_attributes(source, target)

    @contextmanager
    def _folder(self, path: bytes) -> Iterator[int]:
        with beneath(self._layer, path) as folder, keeping_time(folder):
            yield folder

    def _cover(self, parent: bytes, name: bytes) -> bool:
        """Let what the layer itself has at a hidden name cover the lower one; False if nothing."""
        with beneath(self._layer, parent) as folder:
            try:
                own = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return False
        if stat.S_ISDIR(own.st_mode):
            self._make_opaque(os.path.join(parent, name))
        return True

    def _hide(self, parent: bytes, name: bytes) -> None:
        """Hide a lower name that the layer has nothing at."""
        if not self._is_covered(parent) and self._below.find(os.path.join(parent, name)):
            with self._folder(parent) as folder:
                if not self._markers.is_whiteout(folder, name):
                    self._markers.make_whiteout(folder, name)

    def _is_covered(self, path: bytes) -> bool:
        """Say whether the layer hides everything below from `path` down already."""
        while path:
            with beneath(self._layer, path) as folder:
                if self._markers.is_opaque(folder):
                    return True
            path = path.rpartition(b"/")[0]
        return False

    def _make_opaque(self, path: bytes) -> None:
        if self._below.find(path) is not None:
            with self._folder(path) as folder:
                self._markers.make_opaque(folder)

    def _hide_folders_under_files(self) -> None:
        pending = [b""]
        while pending:
            path = pending.pop()
            found = self._below.find(path) if path else None
            if found is not None and not found.is_folder:
                self._make_opaque(path)
            with self._folder(path) as folder, os.scandir(folder) as entries:
                pending += [
                    os.path.join(path, os.fsencode(entry.name))
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                ]


class UnionSnapshotter(BaseSnapshotter):
    """A snapshotter whose snapshots are layers; subclasses say how they are marked and mounted."""

    markers: ClassVar[Markers]

    @abstractmethod
    def _union(self, layers: Sequence[Path], upper: Path | None) -> Mount:
        """Return the mount of `layers`, nearest first, writable where there is an upper folder."""

    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        tree = self._tree(record)
        is_active = record.kind == Kind.ACTIVE
        if below and (is_active or len(below) > 1):
            return [self._union(below, tree if is_active else None)]
        options = ["rbind", "rw" if is_active else "ro"]
        return [Mount(type="bind", source=str(below[0] if below else tree), options=options)]

    def _settle(self, layer: int, notes: Notes, below: Sequence[Path]) -> Usage:
        if below:
            with ExitStack() as opened:
                lowers = [opened.enter_context(folder_descriptor(path)) for path in below]
                merged = _Below(lowers, self.markers)
                _Settling(layer, merged, self.markers).settle(notes)
        return Usage(notes.size, notes.inodes)
