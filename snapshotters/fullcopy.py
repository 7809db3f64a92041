"""The copy backend: every snapshot is a whole tree of its own.

Sync. Needs nothing of the kernel but bind mounts; shares blocks where the file system can (reflink).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

from engine.diff.notes import Notes
from engine.fs.attributes import folder_descriptor
from engine.fs.kernel import syncfs
from engine.fs.usage import measure
from engine.kv.schema import Snapshot
from engine.mount import Mount
from engine.snapshots import Capabilities, Kind, Plugin, Probe, Usage
from snapshotters import probe
from snapshotters.base import BaseSnapshotter
from snapshotters.filling import copy_tree, fill

__all__ = ["CopySnapshotter", "plugin"]


@final
class CopySnapshotter(BaseSnapshotter):
    """Snapshots as full copies."""

    name = "copy"
    # Applied alone like the others; the parent's tree is filled in at commit.
    capabilities = Capabilities(rebase=True, layers=500, name_bytes=255, whiteout_names=True)

    def _make(self, record: Snapshot, below: Sequence[Path]) -> None:
        if record.kind == Kind.ACTIVE and below:
            tree = self._tree(record)
            with folder_descriptor(below[0]) as parent, folder_descriptor(tree) as target:
                copy_tree(parent, target)
                syncfs(target)

    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        is_view = record.kind == Kind.VIEW
        source = below[0] if is_view and below else self._tree(record)
        return [Mount(type="bind", source=str(source), options=["rbind", "ro" if is_view else "rw"])]

    def _settle(self, layer: int, notes: Notes, below: Sequence[Path]) -> Usage:
        if not below:
            return Usage(notes.size, notes.inodes)
        with folder_descriptor(below[0]) as parent:
            fill(parent, layer, notes)
        return Usage(*measure(layer))


def _probe(folder: Path) -> Probe:
    unpacking = probe.try_out(folder)
    return probe.verdict(unpacking, lambda: probe.try_out(folder, probe.by_bind_mount))


plugin = Plugin("copy", CopySnapshotter, _probe, rank=30)
