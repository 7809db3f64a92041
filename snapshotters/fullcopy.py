"""The copy backend: every snapshot is a whole tree of its own.

Sync. Needs nothing of the kernel but bind mounts; shares blocks where the file system can (reflink).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import final

from engine.fs.attributes import folder_descriptor
from engine.fs.durable import flush_file_system
from engine.fs.room import Room
from engine.kv.schema import Snapshot
from engine.mount import Mount
from engine.snapshots import Capabilities, Kind, Plugin, Probe, Usage
from snapshotters import probe
from snapshotters.base import BaseSnapshotter
from snapshotters.comparing import Standing
from snapshotters.copy_standing import stand_on_parent
from snapshotters.filling import fill
from snapshotters.sealing import Settle, Settlement, Unsettled

__all__ = ["CopySnapshotter", "plugin"]


def _settle(below: Sequence[Path], layers: Iterable[Unsettled]) -> Iterator[Settlement]:
    """Fill each layer from the one before it, the first from the nearest of `below`."""
    parent = below[0] if below else None
    for layer in layers:
        tree, outline = layer.tree, layer.outline
        copied = Usage(0, 0)
        if parent:
            with folder_descriptor(parent) as source, folder_descriptor(tree) as target:
                copied = fill(source, target, outline.root, Room(tree.parent))
        yield Settlement(Usage(outline.size + copied.size, outline.inodes + copied.inodes))
        parent = tree


def make_settle() -> Settle:
    """Return what settles applied layers."""
    return _settle


def make_standing() -> Standing:
    """Return what tells how a layer stands on others."""
    return stand_on_parent


@final
class CopySnapshotter(BaseSnapshotter):
    """Snapshots as full copies."""

    name = "copy"
    settle = "snapshotters.fullcopy:make_settle"
    standing = "snapshotters.fullcopy:make_standing"
    # Applied alone like the others; the parent's tree is filled in at commit.
    capabilities = Capabilities(rebase=True, layers=500, name_bytes=255, whiteout_names=True)

    def _make(self, record: Snapshot, below: Sequence[Path]) -> None:
        if record.kind == Kind.ACTIVE and below:
            tree = self._tree(record)
            with folder_descriptor(below[0]) as parent, folder_descriptor(tree) as target:
                fill(parent, target, None, Room(tree.parent))
            flush_file_system(tree)

    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        is_view = record.kind == Kind.VIEW
        source = below[0] if is_view and below else self._tree(record)
        return [Mount(type="bind", source=str(source), options=["rbind", "ro" if is_view else "rw"])]


def _probe(folder: Path) -> Probe:
    unpacking = probe.try_out(folder)
    return probe.verdict(unpacking, lambda: probe.try_out(folder, probe.by_bind_mount))


plugin = Plugin("copy", CopySnapshotter, _probe, rank=30)
