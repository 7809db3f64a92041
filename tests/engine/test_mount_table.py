"""The kernel's table as a value: what is in use, on every file system, namespace and root."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.mount import Mount, mounted
from engine.mounts import table as mount_table
from engine.mounts.table import MountTable, Space, is_mounted, mount_id, parse
from tests.filesystems import formatted
from tests.processes import until

pytestmark = pytest.mark.root


def _snapshot(store: Path, number: int = 1) -> Path:
    folder = store / "snapshots" / "copy" / str(number)
    (folder / "fs").mkdir(parents=True)
    (folder / "work").mkdir()
    return folder


def _bind(source: Path) -> Mount:
    return Mount(type="bind", source=str(source), options=["rbind", "ro"])


def _overlay(*lowers: Path) -> Mount:
    joined = ":".join(f"{lower}/fs" for lower in lowers)
    return Mount(type="overlay", source="overlay", options=["ro", f"lowerdir={joined}"])


@contextmanager
def _place(tmp_path: Path, kind: str) -> Iterator[Path]:
    """Give a folder on a file system of a kind."""
    where = tmp_path / "disk"
    where.mkdir()
    if kind == "here":
        yield where
    elif kind in {"btrfs", "xfs"}:
        with formatted(kind, tmp_path / "image", where):
            yield where
    elif kind == "subvolume":
        with formatted("btrfs", tmp_path / "image", where):
            subprocess.run(["btrfs", "-q", "subvolume", "create", where / "sub"], check=True)
            yield where / "sub"
    elif kind == "overlay":
        for name in ("lower", "upper", "work"):
            (tmp_path / name).mkdir()
        options = [f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work")]
        with mounted([Mount(type="overlay", source="overlay", options=options)], where):
            yield where
    else:
        assert kind == "bound"
        (tmp_path / "real" / "deep").mkdir(parents=True)
        with mounted([Mount(type="bind", source=f"{tmp_path}/real", options=["bind"])], where):
            yield where / "deep"


@pytest.mark.parametrize("kind", ["here", "btrfs", "subvolume", "xfs", "overlay", "bound"])
def test_knows_a_bound_snapshot_on_every_file_system(tmp_path: Path, kind: str):
    target = tmp_path / "mnt"
    target.mkdir()
    with _place(tmp_path, kind) as store:
        one, other = _snapshot(store), _snapshot(store, 11)
        assert not MountTable.read().uses(one)
        with mounted([_bind(one / "fs")], target):
            table = MountTable.read()
            assert table.uses(one)
            assert not table.uses(other)
            entry = table.on_top(target)
            assert entry
            assert table.is_made_of(entry, store / "snapshots")
            assert not table.is_made_of(entry, tmp_path / "elsewhere" / "snapshots")
        assert not MountTable.read().uses(one)


@pytest.mark.parametrize("kind", ["here", "btrfs", "xfs", "bound"])
def test_knows_the_layers_of_an_overlay_on_every_file_system(tmp_path: Path, kind: str):
    target = tmp_path / "mnt"
    target.mkdir()
    with _place(tmp_path, kind) as store:
        one, two, other = (_snapshot(store, number) for number in (1, 2, 3))
        with mounted([_overlay(one, two)], target):
            table = MountTable.read()
            assert [table.uses(folder) for folder in (one, two, other)] == [True, True, False]
            entry = table.on_top(target)
            assert entry
            assert table.is_made_of(entry, store / "snapshots")


def test_knows_a_store_under_its_other_path(tmp_path: Path):
    # Mounted from one path of a store, asked for under another.
    real, bound, target = tmp_path / "real", tmp_path / "bound", tmp_path / "mnt"
    for folder in (real, bound, target):
        folder.mkdir()
    one, two = _snapshot(real), _snapshot(real, 2)
    with mounted([_bind(real)], bound):
        for mount in (_bind(one / "fs"), _overlay(one, two)):
            with mounted([mount], target):
                assert MountTable.read().uses(bound / one.relative_to(real))


def test_another_store_of_the_same_numbers_is_another(tmp_path: Path):
    ours, theirs = _snapshot(tmp_path / "a"), _snapshot(tmp_path / "b")
    second = _snapshot(tmp_path / "b", 2)
    target = tmp_path / "mnt"
    target.mkdir()
    for mount in (_bind(theirs / "fs"), _overlay(theirs, second)):
        with mounted([mount], target):
            assert not MountTable.read().uses(ours)


_IN_CHROOT = """
import os, subprocess, sys
from pathlib import Path
from engine.mounts.table import MountTable
jail, kind = sys.argv[1:]
os.makedirs(f"{jail}/proc"); os.makedirs(f"{jail}/mnt")
for number in (1, 2, 3):
    os.makedirs(f"{jail}/store/snapshots/copy/{number}/fs")
subprocess.run(["mount", "--rbind", "/proc", f"{jail}/proc"], check=True)
from engine.mount import Mount, activate
inside = "" if kind.endswith("within") else jail
one, two = (f"/store/snapshots/copy/{number}/fs" for number in (1, 2))
if kind == "overlay within":
    os.chroot(jail)
mounts = {
    "bind": Mount(type="bind", source=jail + one, options=["rbind", "ro"]),
    "overlay": Mount(type="overlay", source="lower", options=[f"lowerdir={inside}{one}:{inside}{two}"]),
}
activate([mounts[kind.split()[0]]], Path(("" if kind.endswith("within") else jail) + "/mnt"))
if not kind.endswith("within"):
    os.chroot(jail)
os.chdir("/")
table = MountTable.read()
folders = [Path(f"/store/snapshots/copy/{number}") for number in (1, 3)]
print([table.uses(folder) for folder in folders])
"""


@pytest.mark.parametrize("kind", ["bind", "overlay", "overlay within"])
def test_in_a_chroot(tmp_path: Path, kind: str):
    # The mount that the store is on is not in the table there, and paths begin elsewhere.
    script = [sys.executable, "-P", "-c", _IN_CHROOT, str(tmp_path / "jail"), kind]
    done = subprocess.run(["unshare", "-m", *script], capture_output=True, text=True, check=False)
    assert done.stdout == "[True, False]\n", done.stderr


@pytest.mark.parametrize("kind", ["bind", "overlay"])
def test_knows_mounts_of_other_namespaces(tmp_path: Path, kind: str):
    one, two, other = (_snapshot(tmp_path / "store", number) for number in (1, 2, 3))
    target = tmp_path / "mnt"
    target.mkdir()
    words = {
        "bind": ["--bind", f"{one}/fs"],
        "overlay": ["-t", "overlay", "-o", f"lowerdir={one}/fs:{two}/fs", "overlay"],
    }
    script = 'mount "$@" && echo ready && read line'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *words[kind], str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        table = MountTable.read()
        assert (table.uses(one), table.uses(other)) == (True, False)
        assert not is_mounted(target)
        process.stdin.write("\n")
    until(lambda: not MountTable.read().uses(one))


def test_the_cost_of_a_question_does_not_grow_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = [_snapshot(tmp_path, number) for number in range(20)]

    def questions(mounts: int) -> int:
        """Return how many lookups in the file system 20 questions take."""
        lines = [
            b"%d 1 0:%d / /m/%d rw - overlay none ro,lowerdir=/l/%d/fs" % (n, n, n, n)
            for n in range(100, 100 + mounts)
        ]
        table = MountTable(Space(0, "", parse(b"\n".join(lines))), (), True)
        asked = 0

        def counted(_path: object, _other: object) -> bool:
            nonlocal asked
            asked += 1
            return False

        monkeypatch.setattr(os.path, "samefile", counted)
        assert not any(table.uses(folder) for folder in folders)
        return asked

    assert questions(10) == questions(10_000) == 0


def test_a_mount_whose_paths_cannot_be_looked_at_is_taken_at_its_word(tmp_path: Path):
    """The process through which its namespace was read has ended since: the mount may be there."""
    one, two = (_snapshot(tmp_path / "store", number) for number in (1, 2))
    line = f"36 35 0:52 / /mnt rw - overlay overlay ro,lowerdir={one}/fs"
    gone = Space(1, "/proc/self/gone/root", parse(line.encode()))
    table = MountTable(MountTable.read_own().own, (gone,), sees_all=True)
    assert (table.uses(one), table.uses(two)) == (True, False)


def test_layers_are_read_as_kernels_write_them():
    line = (
        b"36 35 0:52 / /mnt/a\\040b rw,relatime shared:1 - overlay overlay "
        b"ro,lowerdir+=/s/1/fs,lowerdir+=/s/2\\054x/fs,upperdir=/s/3/fs,workdir=/s/3/work"
    )
    (entry,) = parse(line)
    assert entry.point == "/mnt/a b"
    assert list(mount_table._overlay_layers(entry)) == ["/s/1/fs", "/s/2,x/fs", "/s/3/fs", "/s/3/work"]
    (short,) = parse(b"36 35 0:52 / /mnt rw - overlay /s/overlay ro,lowerdir=1/fs:2/fs")
    assert list(mount_table._overlay_layers(short)) == ["/s/overlay/1/fs", "/s/overlay/2/fs"]
    (aufs,) = parse(b"36 35 0:52 / /mnt rw - aufs none rw,br:/s/1/fs=rw:/s/2/fs=ro+wh")
    assert list(mount_table._aufs_branches(aufs)) == ["/s/1/fs", "/s/2/fs"]


def test_mounts_have_names_for_ever(tmp_path: Path):
    target = tmp_path / "mnt"
    target.mkdir()
    with mounted([_bind(tmp_path)], target):
        first = mount_id(target)
        table = MountTable.read()
        entry = table.on_top(target)
        assert entry
        assert table.find(first, entry.device) == entry
        assert table.on_top(tmp_path) is None  # it is on a mount, and is none
    assert not MountTable.read().find_anywhere(first, entry.device)
    with mounted([_bind(tmp_path)], target):
        # The kernel gives the same ID again, to a mount of the same device at the same place.
        assert mount_id(target).unique != first.unique
        assert not MountTable.read().find_anywhere(first, entry.device)
