"""A committed snapshot held against its layers: every kind of damage is found, and nothing else is."""

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.diff import acl
from engine.diff.apply import apply_layer
from engine.diff.compare import Difference, compare_layer
from engine.errors import DataLoss, FailedPrecondition
from engine.oci.digest import digest_of
from engine.oci.identity import chain_ids
from engine.snapshots import Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, member
from snapshotters.folder_sink import TREE
from tests.support import BACKENDS, apply_stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

_NONE = 0xFFFFFFFF
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


def acl_of(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


GRANTING = acl_of((1, 7, _NONE), (2, 7, 5), (4, 7, _NONE), (16, 7, _NONE), (32, 7, _NONE))
LEAST = acl_of((1, 7, _NONE), (4, 7, 9), (32, 7, _NONE))


def xattr(key: bytes, value: bytes) -> dict[bytes, bytes]:
    return {b"SCHILY.xattr." + key: value}


BASE = archive(
    member("d/", "5", mode=0o750, uid=7, gid=8, mtime=1000),
    member("d/file", data=b"content\n" * 500, mode=0o4755, uid=7, mtime=1_600_000_000),
    member("d/other", data=b"other\n", pax=xattr(b"user.note", b"hello")),
    member("d/able", data=b"x", pax=xattr(b"security.capability", _CAPABILITY)),
    member("d/granted", data=b"x", mode=0o640, pax=xattr(acl.ACCESS, GRANTING)),
    member("d/least", data=b"x", mode=0o640, pax=xattr(acl.ACCESS, LEAST)),
    member("shared/", "5", pax=xattr(acl.DEFAULT, GRANTING)),
    member("d/link", "2", link="file", uid=5, mtime=5),
    member("d/again", "1", link="d/file"),
    member("d/fifo", "6", mode=0o6600, uid=3),
    member("d/null", "3", device=(1, 3), mode=0o666),
    member("deep/er/est", data=b"deep"),
    member("gone/a", data=b"a"),
    member("gone/b", data=b"b"),
    member("hidden/a", data=b"a"),
    member("empty/", "5"),
)
TOP = archive(
    member("d/new", data=b"new"),  # in a folder that the layer only implies
    member("gone/.wh.a"),
    member("hidden/.wh..wh..opq"),
    member("hidden/b", data=b"b"),
    member("over", data=b"first"),
    member("kept", "1", link="over"),
    member("over", data=b"second"),
)


@dataclass(frozen=True)
class Stack:
    """Two layers, applied: the folders of their snapshots, and what they differ in."""

    backend: Snapshotter
    trees: tuple[Path, Path]
    keys: tuple[str, str]

    def differences(self, number: int) -> list[Difference]:
        layer = (BASE, TOP)[number]
        target = self.backend.comparing(self.keys[number])
        pieces = [layer[at : at + 700] for at in range(0, len(layer), 700)]
        return list(compare_layer(pieces, target, diff_id=digest_of(layer)).differences)

    def told(self, number: int) -> list[tuple[str, str, str]]:
        return [(d.path, str(d.how), d.detail) for d in self.differences(number)]


@pytest.fixture(params=BACKENDS)
def stack(stores: Stores, request: pytest.FixtureRequest) -> Stack:
    backend = stores.snapshotter(request.param)
    apply_stack(backend, [BASE, TOP])
    bottom, top = chain_ids([digest_of(BASE), digest_of(TOP)])
    folder = stores.root.snapshots / request.param
    numbers = sorted(int(path.name) for path in folder.iterdir())
    return Stack(
        backend, (folder / f"{numbers[0]}/{TREE}", folder / f"{numbers[1]}/{TREE}"), (bottom, top)
    )


def flip(path: Path) -> None:
    info = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def keeping_times(folder: Path, change: Callable[[], object]) -> None:
    """Change names in a folder as a file system that lost some would: its time stays."""
    info = folder.stat()
    change()
    os.utime(folder, ns=(info.st_atime_ns, info.st_mtime_ns))


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def replace_folder(path: Path) -> None:
    for child in path.iterdir():
        child.unlink()
    path.rmdir()
    path.symlink_to("/etc")


def separate(path: Path) -> None:
    """Give one name of a file a copy of its own."""
    info, data = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.chown(path, info.st_uid, info.st_gid)
    path.chmod(stat.S_IMODE(info.st_mode))
    os.utime(path, ns=(0, info.st_mtime_ns))


def renumber(path: Path) -> None:
    info = path.lstat()
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.utime(path, ns=(0, info.st_mtime_ns))


@dataclass(frozen=True)
class Row:
    """What is done to the bottom snapshot, and what is then told of it."""

    do: Callable[[Path], object]
    told: list[tuple[str, str, str]] = field(default_factory=list)


IN_D: dict[str, Row] = {
    "a file is missing": Row(lambda d: (d / "other").unlink(), [("d/other", "missing", "")]),
    "a flipped byte": Row(lambda d: flip(d / "file"), [("d/file", "changed", "content")]),
    "a longer file": Row(
        lambda d: keeping_times(d / "other", lambda: os.truncate(d / "other", 9)),
        [("d/other", "changed", "size 9, not 6")],
    ),
    "a mode": Row(lambda d: (d / "other").chmod(0o777), [("d/other", "changed", "mode 0777, not 0644")]),
    "a lost setuid bit": Row(
        lambda d: (d / "file").chmod(0o755), [("d/file", "changed", "mode 0755, not 4755")]
    ),
    "an owner": Row(
        lambda d: os.chown(d / "other", 1, 2), [("d/other", "changed", "owner 1:2, not 0:0")]
    ),
    "a time": Row(
        lambda d: os.utime(d / "other", ns=(0, 1)),
        [("d/other", "changed", "modified at 1e-09, not 1600000000.0")],
    ),
    "an xattr is gone": Row(
        lambda d: os.removexattr(d / "other", "user.note"),
        [("d/other", "changed", "xattr user.note missing")],
    ),
    "an xattr is another": Row(
        lambda d: os.setxattr(d / "other", "user.note", b"bye"),
        [("d/other", "changed", "xattr user.note changed")],
    ),
    "an xattr more": Row(
        lambda d: os.setxattr(d / "other", "user.more", b"x"),
        [("d/other", "changed", "xattr user.more added")],
    ),
    "capabilities are gone": Row(
        lambda d: os.removexattr(d / "able", "security.capability"),
        [("d/able", "changed", "xattr security.capability missing")],
    ),
    "capabilities that no layer gave": Row(
        lambda d: os.setxattr(d / "other", "security.capability", _CAPABILITY),
        [("d/other", "changed", "xattr security.capability added")],
    ),
    "an ACL is gone": Row(
        lambda d: os.removexattr(d / "granted", acl.ACCESS),
        [("d/granted", "changed", "xattr system.posix_acl_access missing")],
    ),
    "overlay would show another file": Row(
        lambda d: os.setxattr(d / "other", "trusted.overlay.redirect", b"/etc"),
        [("d/other", "changed", "xattr trusted.overlay.redirect added")],
    ),
    "a link to elsewhere": Row(
        lambda d: ((d / "link").unlink(), (d / "link").symlink_to("other")),
        [("d/link", "changed", "owner 0:0, not 5:0")],  # the first of it; the text varies with the time
    ),
    "a file became a link": Row(
        lambda d: replace_by_link(d / "other"), [("d/other", "changed", "a symlink, not a file")]
    ),
    "other device numbers": Row(
        lambda d: renumber(d / "null"), [("d/null", "changed", "device 1:5, not 1:3")]
    ),
    "a fifo became a device": Row(
        lambda d: ((d / "fifo").unlink(), os.mknod(d / "fifo", stat.S_IFCHR, os.makedev(1, 3))),
        [("d/fifo", "changed", "a character device, not a fifo")],
    ),
    "two names are two files": Row(
        lambda d: separate(d / "again"),
        [("d/again", "changed", "not the same file as 'd/file'")],
    ),
    "a file more": Row(lambda d: (d / "more").touch(), [("d/more", "added", "")]),
    "a whole folder more": Row(
        lambda d: ((d / "more").mkdir(), (d / "more" / "x").touch()), [("d/more", "added", "")]
    ),
}


@pytest.mark.parametrize("kind", IN_D)
def test_damage_is_found(stack: Stack, kind: str) -> None:
    assert stack.differences(0) == []
    folder, row = stack.trees[0] / "d", IN_D[kind]
    keeping_times(folder, lambda: row.do(folder))
    told = stack.told(0)
    assert [(path, how) for path, how, _ in told] == [(path, how) for path, how, _ in row.told]
    for (_, _, detail), (_, _, wanted) in zip(told, row.told, strict=True):
        assert detail.startswith(wanted), detail


IN_ROOT: dict[str, Row] = {
    "a folder is missing": Row(lambda r: (r / "empty").rmdir(), [("empty", "missing", "")]),
    "a full folder is missing": Row(
        lambda r: ((r / "deep/er/est").unlink(), (r / "deep/er").rmdir(), (r / "deep").rmdir()),
        [("deep", "missing", "")],
    ),
    "a folder became a link": Row(
        lambda r: replace_folder(r / "gone"), [("gone", "changed", "it is no folder")]
    ),
    "a folder's mode": Row(
        lambda r: (r / "empty").chmod(0o700), [("empty", "changed", "mode 0700, not 0644")]
    ),
    "a folder's default ACL": Row(
        lambda r: os.removexattr(r / "shared", acl.DEFAULT),
        [("shared", "changed", "xattr system.posix_acl_default missing")],
    ),
    "an implied folder's owner": Row(
        lambda r: os.chown(r / "deep", 1, 1), [("deep", "changed", "owner 1:1, not 0:0")]
    ),
    "the root's own mode": Row(lambda r: r.chmod(0o700), [("", "changed", "mode 0700, not 0755")]),
    "a file more": Row(lambda r: (r / "more").touch(), [("more", "added", "")]),
}


@pytest.mark.parametrize("kind", IN_ROOT)
def test_damage_to_folders_is_found(stack: Stack, kind: str) -> None:
    tree, row = stack.trees[0], IN_ROOT[kind]
    keeping_times(tree, lambda: row.do(tree))
    assert stack.told(0) == row.told


NO_DAMAGE: dict[str, Callable[[Path], object]] = {
    "access times": lambda d: os.utime(d / "file", ns=(5, (d / "file").stat().st_mtime_ns)),
    "a label of the host's": lambda d: os.setxattr(d / "file", "security.selinux", b"x"),
    "another name elsewhere": lambda d: os.link(d / "other", d.parents[1] / "elsewhere"),
    "trusted xattrs of other programs": lambda d: os.setxattr(d / "file", "trusted.other", b"x"),
}


@pytest.mark.parametrize("kind", NO_DAMAGE)
def test_what_is_no_damage(stack: Stack, kind: str) -> None:
    NO_DAMAGE[kind](stack.trees[0] / "d")
    assert stack.differences(0) == stack.differences(1) == []


def test_looking_leaves_no_trace(stack: Stack) -> None:
    """Not even an access time that is older than a day, which the kernel would set anew."""
    files = [path for path in stack.trees[0].rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
    assert stack.differences(0) == []
    assert {path.stat().st_atime_ns for path in files} == {1}


def test_the_layer_on_top_is_held_against_what_is_below(stack: Stack) -> None:
    """An implied folder has what it has below, and what the layer hides is hidden."""
    assert stack.differences(1) == []
    top = stack.trees[1]
    os.chown(top / "d", 0, 0)
    (found,) = stack.differences(1)
    assert (found.path, found.detail, found.by_below) == ("d", "owner 0:0, not 7:8", True)


@pytest.mark.parametrize("name", ["overlay", "aufs"])
def test_markers_are_compared(stores: Stores, name: str) -> None:
    backend = stores.snapshotter(name)
    apply_stack(backend, [BASE, TOP])
    keys = chain_ids([digest_of(BASE), digest_of(TOP)])
    folder = stores.root.snapshots / name
    bottom, tree = (folder / str(n) / TREE for n in sorted(int(path.name) for path in folder.iterdir()))
    stack = Stack(backend, (bottom, tree), (keys[0], keys[1]))
    if name == "overlay":
        keeping_times(tree / "gone", (tree / "gone" / "a").unlink)
        os.removexattr(tree / "hidden", "trusted.overlay.opaque")
        keeping_times(tree / "d", lambda: os.mknod(tree / "d/other", stat.S_IFCHR, 0))
    else:
        keeping_times(tree / "gone", (tree / "gone" / ".wh.a").unlink)
        keeping_times(tree / "hidden", (tree / "hidden" / ".wh..wh..opq").unlink)
        keeping_times(tree / "d", (tree / "d" / ".wh.other").touch)
    assert [(d.path, d.how, d.by_below) for d in stack.differences(1)] == [
        ("d/other", "added", True),
        ("gone/a", "missing", True),
        ("hidden", "missing", True),
    ]


def test_what_a_copy_has_of_its_parent_is_compared(stores: Stores) -> None:
    backend = stores.snapshotter("copy")
    apply_stack(backend, [BASE, TOP])
    keys = chain_ids([digest_of(BASE), digest_of(TOP)])
    folder = stores.root.snapshots / "copy"
    bottom, tree = (folder / str(n) / TREE for n in sorted(int(path.name) for path in folder.iterdir()))
    stack = Stack(backend, (bottom, tree), (keys[0], keys[1]))
    flip(tree / "d/file")
    keeping_times(tree / "deep/er", (tree / "deep/er/est").unlink)
    keeping_times(tree / "hidden", (tree / "hidden/a").touch)
    keeping_times(tree / "d", lambda: separate(tree / "d/again"))
    found = stack.differences(1)
    assert [(d.path, str(d.how), d.by_below) for d in found] == [
        ("d/again", "changed", True),
        ("d/file", "changed", True),
        ("deep/er/est", "missing", True),
        ("hidden/a", "added", True),
    ]


def test_a_file_that_only_a_hard_link_kept_is_compared(stack: Stack) -> None:
    """Its first name has another file by then, so that it could not be compared when it came."""
    assert (stack.trees[1] / "kept").read_bytes() == b"first"
    flip(stack.trees[1] / "kept")
    assert stack.told(1) == [("kept", "changed", "content")]


MOVED = archive(
    member("a", data=b"same", mode=0o600),
    member("b", "1", link="a"),
    member("a", data=b"same", mode=0o600),
    member("d/x", data=b"in a folder that goes"),
    member("y", "1", link="d/x"),
    member("d", "1", link="d/x"),
    member("self", data=b"self"),
    member("self", "1", link="self"),
)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("path", ["b", "y", "d", "self"])
def test_hard_links_that_outlive_their_target(stores: Stores, name: str, path: str) -> None:
    backend = stores.snapshotter(name)
    key = apply_stack(backend, [MOVED])
    (folder,) = (stores.root.snapshots / name).iterdir()

    def differences() -> list[str]:
        came = compare_layer([MOVED], backend.comparing(key), diff_id=digest_of(MOVED))
        return [f"{d.path} {d.how} {d.detail}" for d in came.differences]

    assert differences() == []
    flip(folder / TREE / path)
    assert differences()
    flip(folder / TREE / path)
    assert differences() == []
    (folder / TREE / path).chmod(0o777)
    assert differences()


PLAIN = archive(member("plain", data=bytes(9000) + b"end"))


def in_one(stack: Stack, layer: bytes, name: str) -> tuple[Path, Callable[[], list[str]]]:
    """Apply a layer by itself; return a file of it, and what tells of differences."""
    key = apply_stack(stack.backend, [layer])
    folder = stack.trees[0].parents[1]
    newest = max(int(path.name) for path in folder.iterdir())

    def differences() -> list[str]:
        came = compare_layer([layer], stack.backend.comparing(key), diff_id=digest_of(layer))
        return [f"{d.path} {d.how} {d.detail}" for d in came.differences]

    return folder / str(newest) / TREE / name, differences


def test_zeros_may_be_a_hole_or_not(stack: Stack) -> None:
    file, differences = in_one(stack, PLAIN, "plain")
    with file.open("r+b") as opened:
        os.truncate(opened.fileno(), 0)
        opened.seek(9000)
        opened.write(b"end")
    os.utime(file, ns=(0, 1_600_000_000 * 10**9))
    assert differences() == []


_TERABYTE = 1 << 40
_SPARSE = [(4096, b"first"), (_TERABYTE - 4, b"last")]


def sparse(name: str) -> bytes:
    """Return a file of a terabyte with nine bytes, as GNU tar packs it (form 0.1)."""
    numbers = ",".join(f"{offset},{len(data)}" for offset, data in _SPARSE)
    pax = {
        b"GNU.sparse.major": b"0",
        b"GNU.sparse.minor": b"1",
        b"GNU.sparse.name": name.encode(),
        b"GNU.sparse.size": str(_TERABYTE).encode(),
        b"GNU.sparse.numblocks": b"2",
        b"GNU.sparse.map": numbers.encode(),
    }
    return member("GNUSparseFile.0/x", data=b"".join(data for _, data in _SPARSE), pax=pax)


def test_holes_cost_nothing(stack: Stack) -> None:
    """Neither does looking for a sparse file that a hard link took elsewhere."""
    layer = archive(sparse("s"), member("kept", "1", link="s"), member("s", data=b"second"))
    file, differences = in_one(stack, layer, "kept")
    assert file.stat().st_size == _TERABYTE
    assert differences() == []
    for at in (0, 4096, _TERABYTE // 2, _TERABYTE - 1):
        info = file.stat()
        with file.open("r+b") as opened:
            opened.seek(at)
            old = opened.read(1)
            opened.seek(at)
            opened.write(b"!")
        os.utime(file, ns=(0, info.st_mtime_ns))
        assert differences(), at
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(old)
        os.utime(file, ns=(0, info.st_mtime_ns))
        assert differences() == [], at


def test_a_copy_of_a_file_of_holes_costs_nothing(stores: Stores) -> None:
    layers = [archive(sparse("s")), archive(member("other"))]
    backend = stores.snapshotter("copy")
    key = apply_stack(backend, layers)
    came = compare_layer([layers[1]], backend.comparing(key), diff_id=digest_of(layers[1]))
    assert list(came.differences) == []
    folder = stores.root.snapshots / "copy"
    newest = max(int(path.name) for path in folder.iterdir())
    file = folder / str(newest) / TREE / "s"
    info = file.stat()
    with file.open("r+b") as opened:
        opened.seek(_TERABYTE // 3)
        opened.write(b"!")
    os.utime(file, ns=(0, info.st_mtime_ns))
    came = compare_layer([layers[1]], backend.comparing(key), diff_id=digest_of(layers[1]))
    assert [(d.path, d.detail) for d in came.differences] == [("s", "content")]


# -- what is on disk leads nowhere ---------------------------------------------------------------


@pytest.mark.parametrize("part", ["", TREE])
def test_a_folder_that_is_a_link_is_not_followed(stack: Stack, part: str, tmp_path: Path) -> None:
    place = stack.trees[0].parent / part if part else stack.trees[0].parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataLoss):
        stack.differences(0)


def test_no_folder_at_all(stack: Stack) -> None:
    stack.trees[0].rename(stack.trees[0].with_name("away"))
    with pytest.raises(DataLoss):
        stack.differences(0)


def test_only_what_is_committed_is_compared(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    backend.prepare("active")
    apply_layer([BASE], backend.sink("active"), diff_id=digest_of(BASE))
    with pytest.raises(FailedPrecondition):
        backend.comparing("active")
