"""The overlay backend: one folder per layer, combined by the kernel's overlay file system.

Sync. Layers are applied straight into their own folder with nothing mounted. What an image could
turn against the mount is switched off in every mount: redirects, metadata-only copies, the index.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import final

from engine.errors import EngineError
from engine.kv.schema import Snapshot
from engine.mount import Mount, mounted
from engine.snapshots import Capabilities, Kind, Plugin, Probe
from snapshotters import probe
from snapshotters.comparing import Standing
from snapshotters.markers import OverlayMarkers
from snapshotters.sealing import Settle
from snapshotters.union import SettleUnion, UnionSnapshotter
from snapshotters.union_standing import UnionStanding

__all__ = ["OverlaySnapshotter", "plugin"]

_WANTED = (
    # option, and the module parameter that tells whether the kernel knows it
    ("index=off", "index"),
    ("metacopy=off", "metacopy"),
    ("redirect_dir=nofollow", "redirect_dir"),
    ("xino=off", "xino_auto"),
)


@cache
def _fixed_options() -> list[str]:
    known = Path("/sys/module/overlay/parameters")
    return [option for option, parameter in _WANTED if (known / parameter).exists()]


def overlay_mount(layers: Sequence[Path], upper: Path | None = None) -> Mount:
    """Return the overlay of `layers`, nearest first, writable where there is an upper folder."""
    options = ["ro"] if upper is None else [f"upperdir={upper}", f"workdir={upper.with_name('work')}"]
    options.append("lowerdir=" + ":".join(map(str, layers)))
    return Mount(type="overlay", source="overlay", options=options + _fixed_options())


def make_settle() -> Settle:
    """Return what settles applied layers."""
    return SettleUnion(OverlayMarkers())


def make_standing() -> Standing:
    """Return what tells how a layer stands on others."""
    return UnionStanding(OverlayMarkers())


@final
class OverlaySnapshotter(UnionSnapshotter):
    """Snapshots as overlay layers."""

    name = "overlay"
    settle = "snapshotters.overlay:make_settle"
    standing = "snapshotters.overlay:make_standing"
    capabilities = Capabilities(
        rebase=True, layers=500, name_bytes=255, whiteout_names=True, shares=True
    )

    def _make(self, record: Snapshot, below: Sequence[Path]) -> None:
        if record.kind == Kind.ACTIVE:
            work = self._tree(record).with_name("work")
            work.mkdir(mode=0o711)
            work.chmod(0o711)

    def _union(self, layers: Sequence[Path], tree: Path, *, writable: bool) -> Mount:
        return overlay_mount(layers, tree if writable else None)


def _try_mount(folder: Path) -> None:
    for name in ("lower", "upper/fs", "upper/work", "merged"):
        (folder / name).mkdir(parents=True)
    (folder / "lower" / "file").touch()

    def change(*more: str) -> None:
        mount = overlay_mount([folder / "lower"], folder / "upper" / "fs")
        mount.options.extend(more)
        with mounted([mount], folder / "merged"):
            os.unlink(folder / "merged" / "file")

    try:
        change("volatile")  # else unmounting flushes what anyone wrote to the whole file system
    except EngineError:  # of a kernel before 5.10; any other comes again
        change()


def _probe(folder: Path) -> Probe:
    unpacking = probe.try_out(folder, probe.by_xattr("trusted.overlay.opaque"), probe.by_type_in_listing)

    def mounting() -> str:
        if not probe.knows_file_system("overlay"):
            return "the kernel has no overlay file system (try `modprobe overlay`)"
        return probe.try_out(folder, probe.by_bind_mount, _try_mount)

    return probe.verdict(unpacking, mounting)


plugin = Plugin("overlay", OverlaySnapshotter, _probe, rank=10)
