"""Every backend runs the one suite; aufs, which no kernel here mounts, the checks without mounts."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.mount import Mount
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.testing.snapshotter_suite import SnapshotterSuite
from snapshotters import aufs, fullcopy, overlay

pytestmark = pytest.mark.root

PLUGINS = {plugin.name: plugin for plugin in (overlay.plugin, aufs.plugin, fullcopy.plugin)}
# What aufs can show without a kernel that has it: records, and views of one layer, which are binds.
WITHOUT_MOUNTS = {
    "check_states",
    "check_prepare_errors",
    "check_commit_errors",
    "check_rebase_errors",
    "check_mounts_errors",
    "check_remove",
    "check_update",
    "check_close_twice",
    "check_empty",
    "check_remove_while_mounted",
}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path / "root") as opened:
        yield opened


CASES = [
    (name, check)
    for name in PLUGINS
    for check in SnapshotterSuite.names()
    if name != "aufs" or check in WITHOUT_MOUNTS
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_contract(name: str, check: str, root: Root, tmp_path: Path) -> None:
    plugin = PLUGINS[name]

    def make() -> Snapshotter:
        return plugin.create(root.snapshots / name, root.meta, "default")

    SnapshotterSuite(make, tmp_path).run(check)


REBASING = (
    "check_commit_errors",
    "check_rebase_errors",
    "check_commit_of_a_chain",
    "check_layers_combine",
    "check_implied_parents",
)


@pytest.mark.parametrize("check", REBASING)
def test_contract_without_rebase(
    check: str, root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(overlay.OverlaySnapshotter.capabilities, rebase=False)
    monkeypatch.setattr(overlay.OverlaySnapshotter, "capabilities", plain)
    test_contract("overlay", check, root, tmp_path)


def test_the_suite_is_not_empty() -> None:
    assert len(SnapshotterSuite.names()) > 15
    assert set(SnapshotterSuite.names()) >= WITHOUT_MOUNTS


def test_aufs_mount_options(root: Root, tmp_path: Path) -> None:
    # A typo in a branch's permission would mount silently wrong (aufs ignores what it does not know),
    # so the exact words are tested.
    backend = aufs.plugin.create(root.snapshots / "aufs", root.meta, "default")
    suite = SnapshotterSuite(lambda: backend, tmp_path)
    suite._base()
    suite._layer("two", "base")
    folder = root.snapshots / "aufs"
    (made,) = backend.prepare("a", "two")
    assert made.options == [
        "dio",
        xino(folder / "3" / "fs"),
        "dirperm1",
        f"br:{folder}/3/fs=rw:{folder}/2/fs=ro+wh:{folder}/1/fs=ro+wh",
    ]
    (view,) = backend.view("v", "two")
    assert view.options == [
        "ro",
        "dio",
        xino(folder / "4" / "fs"),
        "dirperm1",
        f"br:{folder}/2/fs=ro+wh:{folder}/1/fs=ro+wh",
    ]
    assert {(mount.type, mount.source) for mount in (made, view)} == {("aufs", "none")}
    assert backend.view("w", "base") == [
        Mount(type="bind", source=f"{folder}/1/fs", options=["rbind", "ro"])
    ]


def xino(tree: Path) -> str:
    """Return aufs's table of inodes: one name for each snapshot, so that two can be mounted at once."""
    return f"xino=/dev/shm/aufs-{hashlib.sha256(bytes(tree)).hexdigest()[:16]}.xino"


def test_overlay_mounts_switch_off_what_an_image_could_use(root: Root, tmp_path: Path) -> None:
    backend = overlay.plugin.create(root.snapshots / "overlay", root.meta, "default")
    suite = SnapshotterSuite(lambda: backend, tmp_path)
    suite._base()
    (mount,) = backend.prepare("a", "base")
    assert {"redirect_dir=nofollow", "metacopy=off", "index=off"} <= set(mount.options)
