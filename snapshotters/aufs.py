"""The aufs backend: one folder per layer with `.wh.` files, combined by aufs where a kernel has it.

Sync. A layer's folder is the layer as the archive has it; it can be made and read anywhere.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import final

from engine.mount import Mount
from engine.snapshots import Capabilities, Plugin, Probe
from snapshotters import probe
from snapshotters.comparing import Standing
from snapshotters.markers import AufsMarkers
from snapshotters.sealing import Settle
from snapshotters.union import SettleUnion, UnionSnapshotter
from snapshotters.union_standing import UnionStanding

__all__ = ["AufsSnapshotter", "plugin"]

_XINO = "/dev/shm"  # off the branches, where docker and containerd put it too


def aufs_mount(layers: Sequence[Path], tree: Path, *, writable: bool) -> Mount:
    """Return the union of `layers`, nearest first, below the folder `tree` of a snapshot if writable.

    `+wh` makes aufs look for whiteouts on a read-only branch; `dirperm1` keeps the permissions of a
    lower folder from showing through.
    """
    branches = [f"{tree}=rw"] if writable else []
    branches += [f"{layer}=ro+wh" for layer in layers]
    # aufs makes its inode table with O_EXCL and unlinks it: two mounts at once need two names.
    mark = hashlib.sha256(os.fsencode(tree)).hexdigest()[:16]
    options = ["dio", f"xino={_XINO}/aufs-{mark}.xino", "dirperm1", "br:" + ":".join(branches)]
    return Mount(type="aufs", source="none", options=options if writable else ["ro", *options])


def make_settle() -> Settle:
    """Return what settles applied layers."""
    return SettleUnion(AufsMarkers())


def make_standing() -> Standing:
    """Return what tells how a layer stands on others."""
    return UnionStanding(AufsMarkers())


@final
class AufsSnapshotter(UnionSnapshotter):
    """Snapshots as aufs branches."""

    name = "aufs"
    settle = "snapshotters.aufs:make_settle"
    standing = "snapshotters.aufs:make_standing"
    # 127 branches is the kernel's default, one of them to write to; names need room for a doubled
    # `.wh.` and a suffix.
    capabilities = Capabilities(
        rebase=True, layers=126, name_bytes=242, whiteout_names=False, shares=True
    )

    def _union(self, layers: Sequence[Path], tree: Path, *, writable: bool) -> Mount:
        return aufs_mount(layers, tree, writable=writable)


def _probe(folder: Path) -> Probe:
    def mounting() -> str:
        return "" if probe.knows_file_system("aufs") else "the kernel has no aufs"

    return probe.verdict(probe.try_out(folder), mounting)


plugin = Plugin("aufs", AufsSnapshotter, _probe, rank=20)
