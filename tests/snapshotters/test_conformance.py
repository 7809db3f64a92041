"""Every backend runs the one suite; aufs, which no kernel here mounts, the checks without mounts."""

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import EngineError, FailedPrecondition, NotFound
from engine.mount import Mount, activate, mounted
from engine.root import Root
from engine.snapshots import Commit, Kind, Snapshotter
from engine.testing.archives import member
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
    suite._layer("two", "base")
    known = Path("/sys/module/overlay/parameters")
    off = {"index": "off", "metacopy": "off", "redirect_dir": "nofollow", "xino": "off"}
    fixed = [
        f"{option}={value}"
        for option, value in off.items()
        if (known / ("xino_auto" if option == "xino" else option)).exists()
    ]
    assert len(fixed) == len(off), "every kernel since 4.19 knows all of them"
    folder = root.snapshots / "overlay"
    (made,) = backend.prepare("a", "two")
    assert made.options == [
        f"upperdir={folder}/3/fs",
        f"workdir={folder}/3/work",
        f"lowerdir={folder}/2/fs:{folder}/1/fs",
        *fixed,
    ]
    (view,) = backend.view("v", "two")
    assert view.options == ["ro", f"lowerdir={folder}/2/fs:{folder}/1/fs", *fixed]
    assert stat.S_IMODE((folder / "3" / "work").stat().st_mode) == 0o711


def test_an_old_kernel_is_told_only_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: path.name in {"index", "redirect_dir"})
    assert overlay._fixed_options.__wrapped__() == ["index=off", "redirect_dir=nofollow"]


@pytest.mark.parametrize(
    ("plugin", "layers", "name_bytes"), [("overlay", 500, 255), ("copy", 500, 255), ("aufs", 126, 242)]
)
def test_limits_of_backends(plugin: str, layers: int, name_bytes: int, root: Root) -> None:
    backend = PLUGINS[plugin].create(root.snapshots / plugin, root.meta, "default")
    can = backend.capabilities
    assert (can.layers, can.name_bytes) == (layers, name_bytes)
    can.check_layers(plugin, layers)
    with pytest.raises(FailedPrecondition, match=f"at most {layers} layers"):
        can.check_layers(plugin, layers + 1)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_no_chain_is_longer_than_a_backend_can_mount(
    plugin: str, root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PLUGINS[plugin].create(root.snapshots / plugin, root.meta, "default")
    monkeypatch.setattr(type(backend), "capabilities", replace(backend.capabilities, layers=3))
    suite = SnapshotterSuite(lambda: backend, tmp_path)
    for number, below in enumerate(["", "n0", "n1"]):
        suite._layer(f"n{number}", below, member(str(number)))
    with pytest.raises(FailedPrecondition, match="at most 3 layers"):
        suite._layer("n3", "n2", member("3"))
    with pytest.raises(NotFound):
        backend.stat("n3")
    # In one commit too: what fits is there.
    steps = []
    for number in range(4):
        backend.prepare(f"key {number}")
        below = f"m{number - 1}" if number else None
        steps.append(Commit(name=f"m{number}", key=f"key {number}", parent=below))
    with pytest.raises(FailedPrecondition, match="at most 3 layers"):
        backend.commit(*steps)
    assert backend.stat("m2").kind is Kind.COMMITTED
    assert backend.stat("key 3").kind is Kind.ACTIVE


def test_the_kernel_takes_as_many_layers_as_overlay_promises(tmp_path: Path) -> None:
    layers = [tmp_path / str(number) for number in range(overlay.OverlaySnapshotter.capabilities.layers)]
    for layer in layers:
        layer.mkdir()
        (layer / layer.name).touch()
    for name in ("mnt", "upper", "work"):
        (tmp_path / name).mkdir()
    with mounted([overlay.overlay_mount(layers, tmp_path / "upper")], tmp_path / "mnt") as tree:
        assert len(list(tree.iterdir())) == len(layers)
    (tmp_path / "one more").mkdir()
    with pytest.raises(EngineError):
        activate([overlay.overlay_mount([*layers, tmp_path / "one more"])], tmp_path / "mnt")
