"""Attacks that need more than layers and a tree: paths beyond the kernel's, umasks, holes, limits."""

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from engine.app import open_engine
from engine.errors import EngineError, Refused, ResourceExhausted
from engine.oci.digest import digest_of
from engine.oci.identity import chain_ids
from engine.snapshots import Commit
from engine.stores import Stores, open_stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import TreeEntry
from tests.conftest import AMD64
from tests.security.harness import D, F, Fails, H, S, World, check_failure, check_store, descriptors
from tests.support import BACKENDS, apply_stack, tree_of

pytestmark = pytest.mark.root

LONG = "d" * 240  # within what aufs takes
STEPS = "abcdefghijklmnopq"


def _folder_of(stores: Stores, name: str, key: str) -> Path:
    """Return the folder of a snapshot without parents, which every backend bind-mounts."""
    backend = stores.snapshotter(name)
    (mount,) = backend.view("folder", key)
    backend.remove("folder")
    backend.cleanup()
    return Path(mount.source)


def _beyond_the_kernels_limit(victim: Path) -> list[bytes]:
    """Return seventeen long folders, a short link beside each, and a link that climbs back and out."""
    members, path, short = [], "", ""
    for step in STEPS:
        members += [D(path + LONG), S(path + step, LONG)]
        path += f"{LONG}/"
        short += f"{step}/"
    climb = f"{short}{'l' * 200}"
    return [
        *members,
        S(climb, "../" * len(STEPS)),
        S("escape", f"{climb}/../../../../../..{victim}"),
        F("escape/pwn", b"in"),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("umask_0")
def test_links_beyond_the_longest_path(backend: str, stores: Stores, world: World):
    """P-16: a resolver of whole paths gives up on this link, and the kernel would follow it out."""
    layer = archive(*_beyond_the_kernels_limit(world.victim))
    before = descriptors()
    top = _folder_of(stores, backend, apply_stack(stores.snapshotter(backend), [layer]))
    inside = top / str(world.victim).lstrip("/")
    assert (inside / "pwn").read_bytes() == b"in"
    assert os.listdir(inside) == ["pwn"]
    deepest = max((here for here, *_ in os.fwalk(top)), key=len)
    assert deepest.removeprefix(str(top)) == f"/{LONG}" * len(STEPS)
    assert descriptors() == before
    world.check_untouched(stores.root.path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("umask_0")
def test_nobody_else_reaches_a_setuid_file(backend: str, stores: Stores):
    """X-03: every folder on the way to a tree is closed, and so are the files beside it."""
    apply_stack(stores.snapshotter(backend), [archive(F("su", b"x", mode=0o4755))])
    root = stores.root.path
    (number,) = (root / "snapshots" / backend).iterdir()
    for folder in (root, root / "snapshots", root / "snapshots" / backend, number, root / "trash"):
        info = folder.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o700, 0, 0), folder
    for file in root.rglob("*.mdb"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert stat.S_IMODE((number / "fs" / "su").stat().st_mode) == 0o4755


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("umask_0")
def test_root_folder_is_always_the_same(backend: str, stores: Stores, world: World):
    """X-14, W9: no entry for the root decides its owner, mode or time."""
    layers = [
        archive(member("./", "5", mode=0o700, uid=1000, gid=1000, mtime=5), F("f")),
        archive(F("g"), D("/", 0o4777, uid=7)),
    ]
    top = apply_stack(stores.snapshotter(backend), layers)
    for number in (stores.root.snapshots / backend).iterdir():
        info = (number / "fs").stat()
        facts = (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns)
        assert facts == (0o755, 0, 0, 0)
    assert set(tree_of(stores, backend, top, world.top / "mnt")) == {b"f", b"g"}


@pytest.mark.usefixtures("umask_0")
def test_overlay_is_told_not_to_follow(stores: Stores):
    """X-01: whatever xattrs got into a layer, the mount says that they mean nothing."""
    backend = stores.snapshotter("overlay")
    top = apply_stack(backend, [archive(F("a")), archive(F("b"))])
    known = Path("/sys/module/overlay/parameters")
    wanted = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off"}
    for make in (backend.prepare, backend.view):
        (mount,) = make(make.__name__, top)
        for option, value in wanted.items():
            assert (f"{option}={value}" in mount.options) == (known / option).exists()
        assert "userxattr" not in mount.options


async def _unpack_under(mask: int, root: Path, image: Path) -> None:
    os.umask(mask)
    async with open_engine(root, platform=AMD64) as engine:
        for backend in BACKENDS:
            await engine.import_image(image, name="x:1", snapshotter=backend, replace=True)


def _trees(root: Path, top: str, target: Path) -> list[dict[bytes, TreeEntry]]:
    with open_stores(root, "default", AMD64) as stores:
        return [tree_of(stores, name, top, target) for name in BACKENDS]


def _modes(root: Path) -> list[tuple[str, str]]:
    """Return the mode of each file of a store; which layer got which number is left to chance."""
    paths = {path: re.sub(r"/\d+(/|$)", "/N/", str(path.relative_to(root))) for path in root.rglob("*")}
    return sorted((name, stat.filemode(path.lstat().st_mode)) for path, name in paths.items())


def test_umask_leaves_no_trace(tmp_path: Path):
    """X-13: a real worker, asked under the widest and the narrowest umask, stores the same modes."""
    layers = [
        archive(F("f", b"1", mode=0o666), D("d", 0o777), F("i/j/f", b"2"), member("p", "6", mode=0o666)),
        archive(F(".wh.f"), F("d/g", b"3", mode=0o777), F("i/k/f"), S("l", "f"), H("d/h", "d/g")),
        archive(F("d/.wh..wh..opq"), D("i", 0o1777), F("new/f")),
    ]
    image = layout(tmp_path / "image", layers)
    top = chain_ids([digest_of(layer) for layer in layers])[-1]
    modes: list[list[tuple[str, str]]] = []
    trees: list[dict[bytes, TreeEntry]] = []
    for mask in (0o000, 0o077):
        root = tmp_path / f"root-{mask:o}"
        trio.run(_unpack_under, mask, root, image)
        modes.append(_modes(root))
        os.umask(0o022)
        trees += _trees(root, top, tmp_path / "mnt")
    assert all(tree == trees[0] for tree in trees)
    assert stat.S_IMODE(trees[0][b"d"].mode) == 0o777
    assert stat.S_IMODE(trees[0][b"new"].mode) == 0o755
    assert ("meta.lmdb/data.mdb", "-rw-------") in modes[0]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_holes_stay_holes(backend: str, stores: Stores):
    """X-16: a file of 8 TiB that holds four bytes costs four bytes, also as somebody's parent."""
    size = 8 << 40
    snapshotter = stores.snapshotter(backend)
    (mount,) = snapshotter.prepare("huge")
    huge = Path(mount.source) / "huge"
    with huge.open("wb") as file:
        file.seek(1 << 40)
        file.write(b"data")
        file.truncate(size)
    snapshotter.commit(Commit(name="parent", key="huge"))
    snapshotter.prepare("child", "parent")
    for key in ("parent", "child"):
        assert snapshotter.usage(key).size < 1 << 20
    copy = Path(snapshotter.sink("child").place) / "fs" / "huge"
    assert copy.exists() == (backend == "copy")
    if copy.exists():
        assert copy.stat().st_size == size
        with copy.open("rb") as file:
            file.seek((1 << 40) - 2)
            assert file.read(8) == b"\0\0data\0\0"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("umask_0")
def test_file_systems_limit_of_links(
    backend: str, stores: Stores, world: World, monkeypatch: pytest.MonkeyPatch
):
    """X-17: at the limit the layer is refused as a whole. The limit is ours: file systems differ."""
    real, calls = os.link, []

    def limited(*args, **more):
        calls.append(args)
        if len(calls) > 20:
            raise OSError(errno.EMLINK, "Too many links")
        real(*args, **more)

    monkeypatch.setattr(os, "link", limited)
    layer = archive(F("f"), *(H(f"l{number}", "f") for number in range(30)))
    before = descriptors()
    fails = Fails("too many links", ResourceExhausted)
    check_failure(stores.snapshotter(backend), [layer], fails)
    assert len(calls) == 21
    assert descriptors() == before
    check_store(stores, stores.snapshotter(backend))
    world.check_untouched(stores.root.path)


@pytest.mark.parametrize(
    ("code", "blocks", "kind", "says"),
    [
        (errno.E2BIG, 0, Refused, "do not fit in this file system"),
        (errno.ENOSPC, 1 << 20, Refused, "do not fit in this file system"),
        (errno.ENOSPC, 1000, ResourceExhausted, "no space left"),
        (errno.EDQUOT, 1 << 20, ResourceExhausted, "quota"),
    ],
)
@pytest.mark.parametrize("entry", [F, D])
@pytest.mark.usefixtures("umask_0")
def test_xattrs_that_a_file_system_cannot_hold(
    entry: Callable[..., bytes],
    code: int,
    blocks: int,
    kind: type[EngineError],
    says: str,
    stores: Stores,
    monkeypatch: pytest.MonkeyPatch,
):
    """X-07: ext4 says "no space" of an xattr that is too large, which is no reason to free any."""

    def refuse(*_arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "fstatvfs", lambda _file: SimpleNamespace(f_bavail=blocks, f_frsize=4096))
    layer = archive(entry("d", pax={b"SCHILY.xattr.user.x": b"v"}))
    check_failure(stores.snapshotter("overlay"), [layer], Fails(says, kind))


def test_p_04_links_that_multiply_steps_end_early(stores, umask_0):
    # Each link walks hundreds of folders back and forth and leads to the next: a few kilobytes that
    # would take minutes for one entry. (xfs takes links of up to 1,024 bytes.)
    links = [member(f"L{n}", "2", link="d/../" * 200 + f"L{n + 1}") for n in range(100)]
    layer = archive(member("d/", "5"), *links, member("L100/", "5"), member("L0/L0/L0/f"))
    with pytest.raises(Refused, match="too many steps"):
        apply_stack(stores.snapshotter("overlay"), [layer])
