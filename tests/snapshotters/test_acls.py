"""POSIX ACLs are kept wherever a file system takes them, and nothing inherits one by being made."""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.diff import acl
from engine.diff.apply import apply_layer
from engine.fs.attributes import folder_descriptor
from engine.mount import Mount, mounted
from engine.oci.digest import digest_of
from engine.root import Root
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.testing.trees import TreeEntry
from snapshotters.attributes import read_attributes
from tests.conftest import AMD64
from tests.filesystems import formatted
from tests.support import BACKENDS, apply_stack, tree_of

_NONE = 0xFFFFFFFF


def acl_of(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def granting(user: int, mode: int) -> bytes:
    """Return what a file of this mode has that grants a user everything else."""
    owner, group, other = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    named = ((2, 7, user), (4, 5, _NONE), (8, 3, 99))
    return acl_of((1, owner, _NONE), *named, (16, group, _NONE), (32, other, _NONE))


def pax(**values: bytes) -> dict[bytes, bytes]:
    return {f"SCHILY.xattr.system.posix_acl_{key}".encode(): value for key, value in values.items()}


# -- well-formed or not -----------------------------------------------------------------------

_OWNER, _GROUP, _MASK, _OTHER = (1, 7, _NONE), (4, 7, _NONE), (16, 7, _NONE), (32, 7, _NONE)
_USER, _TEAM = (2, 7, 5), (8, 7, 5)
_GOOD = {
    "least": (_OWNER, _GROUP, _OTHER),
    "mask": (_OWNER, _GROUP, _MASK, _OTHER),
    "user": (_OWNER, _USER, _GROUP, _MASK, _OTHER),
    "group": (_OWNER, _GROUP, _TEAM, _MASK, _OTHER),
    "several": (_OWNER, _USER, _USER, _GROUP, _TEAM, _TEAM, _MASK, _OTHER),
}
_BAD = {
    "no-owner": (_GROUP, _OTHER),
    "no-group": (_OWNER, _OTHER),
    "no-other": (_OWNER, _GROUP),
    "no-mask": (_OWNER, _USER, _GROUP, _OTHER),
    "no-mask-for-a-group": (_OWNER, _GROUP, _TEAM, _OTHER),
    "two-owners": (_OWNER, _OWNER, _GROUP, _OTHER),
    "out-of-order": (_OWNER, _GROUP, _USER, _MASK, _OTHER),
    "permissions": (_OWNER, (4, 8, _NONE), _OTHER),
    "unknown-tag": (_OWNER, _GROUP, (64, 7, _NONE), _OTHER),
    "nobody": (_OWNER, (2, 7, _NONE), _GROUP, _MASK, _OTHER),
}


@pytest.mark.root
def test_what_is_well_formed_is_what_the_kernel_takes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with mounted([Mount(type="tmpfs", source="tmpfs", options=[])], tmp_path):
        file.touch()
        values = {name: acl_of(*entries) for name, entries in (_GOOD | _BAD).items()}
        values |= {"short": acl_of(*_GOOD["mask"])[:-1], "old": b"\1\0\0\0"}
        for name, value in values.items():
            try:
                os.setxattr(file, acl.ACCESS, value)
            except OSError:
                assert (acl.is_well_formed(value), name in _GOOD) == (False, False), name
            else:
                assert (acl.is_well_formed(value), name in _GOOD) == (True, True), name
        for nothing in (b"", acl_of()):
            os.setxattr(file, acl.ACCESS, granting(5, 0o644))
            os.setxattr(file, acl.ACCESS, nothing)
            assert acl.is_empty(nothing)
            assert not os.listxattr(file)


# -- trees ------------------------------------------------------------------------------------

_D, _E, _NEW_E = granting(1, 0o770), granting(2, 0o775), granting(3, 0o755)
LAYERS = [
    archive(
        member("d/", "5", mode=0o770, gid=5, pax=pax(access=_D, default=_E)),
        member("d/acl", mode=0o4750, uid=7, pax=pax(access=granting(4, 0o750))),
        member("d/plain"),
        member("d/in/file"),
        member("e/", "5", mode=0o755),
        member("e/plain"),
        member("e/gone"),
        member("e/in/file", mode=0o600),
        member("e/pipe", "6"),
        member("e/link", "2", link="plain"),
    ),
    archive(
        member("d/new"),  # d is only implied
        member("d/in/new"),
        # Nothing of the layer below inherits from what this is now.
        member("e/", "5", mode=0o2775, gid=6, pax=pax(access=_E, default=_NEW_E)),
        member("e/.wh.gone"),
        # A mode that says less than the ACL: it is what counts.
        member("less", mode=0o600, pax=pax(access=granting(5, 0o777))),
    ),
]


def check(tree: dict[bytes, TreeEntry]) -> None:
    facts = {
        name.decode(): (stat.S_IMODE(entry.mode), entry.owner, dict(entry.xattrs))
        for name, entry in tree.items()
    }
    access, default = acl.ACCESS.decode(), acl.DEFAULT.decode()
    assert facts == {
        "d": (0o770, (0, 5), {access: _D, default: _E}),
        "d/acl": (0o4750, (7, 0), {access: granting(4, 0o750)}),
        "d/plain": (0o644, (0, 0), {}),
        "d/in": (0o755, (0, 0), {}),
        "d/in/file": (0o644, (0, 0), {}),
        "d/in/new": (0o644, (0, 0), {}),
        "d/new": (0o644, (0, 0), {}),
        "e": (0o2775, (0, 6), {access: _E, default: _NEW_E}),
        "e/plain": (0o644, (0, 0), {}),
        "e/in": (0o755, (0, 0), {}),
        "e/in/file": (0o600, (0, 0), {}),
        "e/pipe": (0o644, (0, 0), {}),
        "e/link": (0o777, (0, 0), {}),
        "less": (0o600, (0, 0), {access: granting(5, 0o600)}),
    }


@pytest.fixture(params=["tmpfs", "ext4", "btrfs", "xfs"])
def on_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = (
        mounted([Mount(type="tmpfs", source="tmpfs", options=[])], disk)
        if request.param == "tmpfs"
        else formatted(request.param, tmp_path / "image", disk)
    )
    with made, Root(disk / "root") as root:
        yield Stores(root, "default", AMD64)


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_acls_are_the_same_on_every_file_system_and_backend(on_disk: Stores, tmp_path: Path) -> None:
    for backend in BACKENDS:
        top = apply_stack(on_disk.snapshotter(backend), LAYERS)
        check(tree_of(on_disk, backend, top, tmp_path / "mnt"))
    for place in on_disk.root.snapshots.glob("*/*/fs/d"):
        with folder_descriptor(place) as folder:
            assert dict(read_attributes(folder).xattrs) == {acl.ACCESS: _D, acl.DEFAULT: _E}


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_a_copy_of_a_snapshot_has_its_acls(backend: str, stores: Stores, tmp_path: Path) -> None:
    snapshotter = stores.snapshotter(backend)
    mounts = snapshotter.prepare("key", apply_stack(snapshotter, LAYERS))
    (tmp_path / "mnt").mkdir()
    with mounted(mounts, tmp_path / "mnt"):
        assert os.getxattr(tmp_path / "mnt/d", acl.DEFAULT) == _E
        (tmp_path / "mnt/d/made").touch()
        found = [key for key in os.listxattr(tmp_path / "mnt/d/made") if "SGI_ACL" not in key]  # xfs
        assert found == [acl.ACCESS.decode()]


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_where_there_are_no_acls_they_are_left_out_and_counted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with formatted("btrfs", tmp_path / "image", disk, "noacl"), Root(disk / "root") as root:
        backend = Stores(root, "default", AMD64).snapshotter("copy")
        backend.prepare("key")
        layer = LAYERS[0]
        done = apply_layer([layer], backend.sink("key"), diff_id=digest_of(layer))
        assert done.xattrs_left_out == 3
        made = Path(backend.sink("key").place, "fs/d")
        assert stat.S_IMODE(made.stat().st_mode) == 0o770
        assert os.listxattr(made) == []
