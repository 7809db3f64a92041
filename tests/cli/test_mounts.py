"""Mounts over their life: who is in them, what vanished, what is kept, and who may not take it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.kv.schema import MOUNTS, MountRecord
from engine.metadata.mounts import MountState, MountStore
from engine.root import Root, open_root
from engine.testing.archives import archive, layout, member
from tests.cli.failing import assert_fails, assert_one_line
from tests.cli.test_commands import CHAIN
from tests.command import LAMINA, dump, lamina, lamina_json
from tests.filesystems import formatted
from tests.processes import Victim

pytestmark = pytest.mark.root


@pytest.fixture
def two_backends(stocked: Path) -> Path:
    lamina(stocked, "unpack", "app:1", "--snapshotter", "copy")
    return stocked


@contextmanager
def _someone_in(folder: Path, how: str = "cwd") -> Iterator[int]:
    """Run a process that is in a folder; give its ID."""
    script = {
        "cwd": "import os; os.chdir(where)",
        "open file": "file = open(where + '/etc/name')",
        "mapped file": (
            "import mmap, os; f = open(where + '/etc/name'); m = mmap.mmap(f.fileno(), 0, prot=1); "
            "os.closerange(3, 64)"  # mmap keeps a descriptor of its own
        ),
        "root": "import os; os.chroot(where)",
    }[how]
    code = (
        f"import sys; where = {str(folder)!r}; {script}; print('in', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "in\n"
        try:
            yield process.pid
        finally:
            process.stdin.close()


def _keys(root: Path) -> set[str]:
    """Return the keys of the snapshots that are no layers."""
    rows = lamina_json(root, "snapshots", "ls")
    return {row["key"] for row in rows if row["kind"] != "committed"}


def _besides_times(root: Path) -> dict[str, list[Any]]:
    """Return what a store holds; to unpack again touches the times of blobs, and of its image."""
    held = {table: records for table, records in dump(root).items() if table != "blobs"}
    held["images"] = [{**image, "used": 0} for image in held["images"]]
    return held


def _mounts(root: Path) -> list[tuple[str, str]]:
    return [(row["name"], row["state"]) for row in lamina_json(root, "mounts")]


def _umount(target: Path, *words: str) -> None:
    subprocess.run(["umount", *words, target], check=True)


# -- records ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_mounts_are_listed(two_backends: Path, target: Path, backend: str):
    root = two_backends
    lamina(root, "mount", "app:1", target, "--snapshotter", backend, "--name", "web")
    (row,) = lamina_json(root, "mounts")
    assert (row["name"], row["target"], row["snapshotter"]) == ("web", str(target), backend)
    assert (row["rw"], row["state"], row["parent"]) == (False, "mounted", CHAIN[-1])
    assert row["image"] == "docker.io/library/app:1"
    header, line = (text.split() for text in lamina(root, "mounts").stdout.splitlines())
    assert header[-1] == "NAME"
    assert line[0] == str(target)
    lamina(root, "umount", target)
    assert _mounts(root) == []


@pytest.mark.parametrize("healer", ["gc", "mount", "umount"])
def test_a_view_that_others_unmounted_frees_its_layers(
    stocked: Path, target: Path, tmp_path: Path, healer: str
):
    before = _besides_times(stocked)
    key = lamina_json(stocked, "mount", "app:1", target)["name"]
    _umount(target)
    assert _mounts(stocked) == []
    if healer == "gc":
        would = lamina_json(stocked, "gc", "--dry-run")["snapshots"]
        done = lamina_json(stocked, "gc")["snapshots"]
        assert [node["key"] for node in would] == [node["key"] for node in done] == [key]
    elif healer == "umount":
        lamina(stocked, "umount", target)
    else:
        again = lamina_json(stocked, "mount", "app:1", target)["name"]
        assert _keys(stocked) == {again}
        lamina(stocked, "umount", target)
    assert _besides_times(stocked) == before


def test_what_a_dry_run_says_of_a_vanished_mount_is_what_goes(stocked: Path, target: Path):
    lamina(stocked, "mount", "app:1", target)
    _umount(target)
    lamina(stocked, "image", "rm", "app:1")
    would = lamina_json(stocked, "gc", "--dry-run")
    done = lamina_json(stocked, "gc")
    assert {node["key"] for node in would["snapshots"]} == {node["key"] for node in done["snapshots"]}
    assert len(done["snapshots"]) == 3
    assert {name: records for name, records in dump(stocked).items() if records} == {}


def test_a_mount_of_another_boot_has_vanished(stocked: Path, target: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    view = lamina_json(stocked, "mount", "app:1", target)["name"]
    kept = lamina_json(stocked, "mount", "app:1", other, "--rw")["name"]
    (other / "written").write_text("before the reboot\n")
    _umount(target)
    _umount(other)
    with Root(stocked) as root, root.meta.write() as txn:
        for record in MOUNTS.scan(txn):
            MOUNTS.put(txn, msgspec.structs.replace(record, boot="before"), "default", record.key)
    lamina(stocked, "gc")
    assert _keys(stocked) == {kept}
    assert view not in str(lamina_json(stocked, "mounts"))
    assert _mounts(stocked) == [(kept, "kept")]
    lamina(stocked, "mount", "app:1", other, "--rw")
    try:
        assert (other / "written").read_text() == "before the reboot\n"
    finally:
        lamina(stocked, "umount", other)


def test_a_mount_of_a_killed_namespace_has_vanished(stocked: Path, target: Path):
    command = [*LAMINA, "--root", str(stocked), "mount", "app:1", str(target)]
    subprocess.run(["unshare", "-m", *command], check=True)
    assert len(_keys(stocked)) == 1
    assert _mounts(stocked) == []
    lamina(stocked, "gc")
    assert _keys(stocked) == set()


def test_a_mount_of_another_namespace_is_not_touched(two_backends: Path, target: Path):
    root = two_backends
    script = '"$@" && echo ready && read line'
    mount = [*LAMINA, "--root", str(root), "mount", "app:1", str(target), "--rw", "--name", "there"]
    command = ["unshare", "-m", "sh", "-c", script, "sh", *mount, "--snapshotter", "copy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert _mounts(root) == [("there", "mounted")]
        lamina(root, "gc")
        assert_fails(root, "snapshots", "rm", "there", code=6, says="is mounted")
        assert_fails(
            root,
            "umount",
            target,
            code=6,
            says="is mounted in another mount namespace; unmount it from there",
        )
        # The same folder here is another: it can be used.
        lamina(root, "mount", "app:1", target)
        lamina(root, "umount", target)
        process.stdin.write("\n")
    lamina(root, "gc")
    assert _mounts(root) == [("there", "kept")]


def test_a_copy_of_a_mount_in_another_namespace_keeps_its_files(two_backends: Path, target: Path):
    root = two_backends
    lamina(root, "mount", "app:1", target, "--rw", "--name", "web", "--snapshotter", "copy")
    script = "mount --make-rprivate / && echo ready && read line"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        lamina(root, "umount", target)
        assert_fails(root, "snapshots", "rm", "web", code=6, says="mounted")
        assert_fails(root, "mount", "web", target, code=6, says="mounted elsewhere")
        process.stdin.write("\n")
    lamina(root, "snapshots", "rm", "web")
    assert _keys(root) == set()


# -- two at once ------------------------------------------------------------------------------


def test_one_writer_per_target(stocked: Path, target: Path):
    with open_root(stocked) as root:
        store = MountStore(root.meta, "default")
        record = MountRecord(
            key="first",
            target=str(target),
            backend="overlay",
            rw=False,
            image="docker.io/library/app:1",
            top=CHAIN[-1],
            state=MountState.CHANGING,
            created=0,
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            space=Path("/proc/self/ns/mnt").stat().st_ino,
            processes=Path("/proc/self/ns/pid").stat().st_ino,
        )
        with store.claimed(record, over=None, takes_target=True) as mine:
            for namespace in ("default", "team"):
                done = lamina(stocked, "--namespace", namespace, "import", layout_of(target), code=0)
                words = ("--namespace", namespace, "mount", "empty:1", target)
                done = lamina(stocked, *words, code=6)
                assert_one_line(done.stderr, "is being mounted or unmounted by another process")
            assert_one_line(lamina(stocked, "umount", target, code=6).stderr, "is being mounted")
            assert store.drop(mine)
    assert not os.path.ismount(target)
    lamina(stocked, "mount", "app:1", target)
    lamina(stocked, "umount", target)
    assert _keys(stocked) == set()


def layout_of(target: Path) -> Path:
    path = target.with_name("empty")
    return path if path.exists() else layout(path, [archive(member("file"))], tag="1")


def test_two_mounts_of_one_target_at_once(stocked: Path, target: Path):
    both = [Victim(stocked, ["mount", "app:1", str(target)]) for _ in range(2)]
    codes = sorted(process.wait()[0] for process in both)
    assert codes == [0, 6]
    assert len(_keys(stocked)) == 1
    lamina(stocked, "umount", target)
    assert not os.path.ismount(target)
    assert _keys(stocked) == set()


# -- busy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cwd", "open file", "mapped file", "root"])
@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_a_busy_mount_stays_and_its_holder_is_named(
    two_backends: Path, target: Path, how: str, backend: str
):
    root = two_backends
    lamina(root, "mount", "app:1", target, "--snapshotter", backend)
    with _someone_in(target, how) as pid:
        assert_fails(root, "umount", target, code=6, says=f"(pid {pid}, ")
    lamina(root, "umount", target)
    assert _mounts(root) == []


def test_mounts_on_a_mount_are_named(stocked: Path, target: Path):
    lamina(stocked, "mount", "app:1", target)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target / "etc"], check=True)
    assert_fails(stocked, "umount", target, code=6, says=f"unmount {target}/etc first")
    _umount(target / "etc")
    lamina(stocked, "umount", target)


@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_lazy_keeps_the_files_of_who_is_still_in_it(
    two_backends: Path, target: Path, rw: bool, backend: str
):
    root = two_backends
    words = ["--snapshotter", backend, *(["--rw"] if rw else [])]
    key = lamina_json(root, "mount", "app:1", target, *words)["name"]
    with _someone_in(target) as pid:
        said = lamina(root, "umount", target, "--lazy").stderr
        assert "whoever is in it goes on" in said
        assert key in said
        assert not os.path.ismount(target)
        assert _mounts(root) == [(key, "lazy")]
        inside = Path(f"/proc/{pid}/cwd/etc/name")
        lamina(root, "image", "rm", "app:1")
        gone = lamina_json(root, "gc")["snapshots"]
        assert backend not in {node["snapshotter"] for node in gone}
        assert_fails(root, "snapshots", "rm", key, code=6, says=f"(pid {pid}, ")
        assert inside.read_text() == "upper\n"
    assert lamina_json(root, "gc")["snapshots"] == [], "until the next boot, or until told"
    lamina(root, "snapshots", "rm", key)
    assert (_mounts(root), _keys(root)) == ([], set())


def test_a_second_writable_mount_shares_nothing_with_a_lazy_one(stocked: Path, target: Path):
    first = lamina_json(stocked, "mount", "app:1", target, "--rw")["name"]
    with _someone_in(target) as pid:
        lamina(stocked, "umount", target, "--lazy")
        second = lamina_json(stocked, "mount", "app:1", target, "--rw")["name"]
        assert first != second
        Path(f"/proc/{pid}/cwd/of-the-first").touch()
        assert not (target / "of-the-first").exists()
        lamina(stocked, "umount", target)
        assert_fails(stocked, "mount", first, target, code=6, says="was unmounted with --lazy")
    assert dict(_mounts(stocked)) == {first: "lazy", second: "kept"}


def test_a_lazy_mount_ends_with_the_boot(stocked: Path, target: Path, tmp_path: Path):
    keys = []
    for words in ([], ["--rw"]):
        keys.append(lamina_json(stocked, "mount", "app:1", target, *words)["name"])
        lamina(stocked, "umount", target, "--lazy")
    with Root(stocked) as root, root.meta.write() as txn:
        for record in MOUNTS.scan(txn):
            MOUNTS.put(txn, msgspec.structs.replace(record, boot="before"), "default", record.key)
    assert [node["key"] for node in lamina_json(stocked, "gc")["snapshots"]] == keys[:1]
    assert _mounts(stocked) == [(keys[1], "kept")]


@pytest.mark.parametrize("healer", ["gc", "umount", "snapshots rm", "mount"])
@pytest.mark.parametrize("rw", [False, True])
def test_what_somebody_unmounted_lazily_stays_while_it_is_seen_in_use(
    stocked: Path, target: Path, rw: bool, healer: str
):
    words = ("mount", "app:1", target, *(["--rw"] if rw else []))
    key = lamina_json(stocked, *words)["name"]
    with _someone_in(target) as pid:
        _umount(target, "-l")
        if healer == "gc":
            assert lamina_json(stocked, "gc")["snapshots"] == []
        elif healer == "umount":
            lamina(stocked, "umount", target)
        elif healer == "mount":
            assert lamina_json(stocked, *words)["name"] != key
            lamina(stocked, "umount", target)
        assert_fails(stocked, "snapshots", "rm", key, code=6, says=f"(pid {pid}, ")
        assert key in _keys(stocked)
    lamina(stocked, "snapshots", "rm", key)


# -- what is kept -----------------------------------------------------------------------------


def test_a_kept_mount_outlives_the_name_of_its_image(stocked: Path, target: Path, tmp_path: Path):
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", "web")
    (target / "written").write_text("kept\n")
    assert "web" in lamina(stocked, "umount", target).stderr
    lamina(stocked, "image", "rm", "app:1")
    lamina(stocked, "gc")
    assert _mounts(stocked) == [("web", "kept")]
    other = tmp_path / "other"
    other.mkdir()
    assert lamina_json(stocked, "mount", "web", other)["state"] == "mounted"
    assert (other / "written").read_text() == "kept\n"
    assert (other / "etc/name").read_text() == "upper\n"
    assert_fails(stocked, "mount", "web", target, code=6, says=f"web is mounted at {other}")
    assert_fails(stocked, "umount", target, code=3, says="mounted nothing")
    lamina(stocked, "umount", other)
    lamina(stocked, "snapshots", "rm", "web")
    lamina(stocked, "gc")
    assert {name: records for name, records in dump(stocked).items() if records} == {}


def test_names_are_for_one_mount(stocked: Path, target: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    lamina(stocked, "mount", "app:1", target, "--name", "web")
    assert_fails(
        stocked, "mount", "app:1", other, "--name", "web", code=4, says="a mount named web is mounted"
    )
    lamina(stocked, "umount", target)
    assert_fails(stocked, "mount", "app:1", other, "--name", "../x", code=2, says="is not a name")
    assert not os.path.ismount(other)


def test_two_backends_keep_apart_and_the_command_asks(two_backends: Path, target: Path):
    root = two_backends
    keys = {}
    for backend in ("overlay", "copy"):
        words = ("mount", "app:1", target, "--rw", "--snapshotter", backend)
        keys[backend] = lamina_json(root, *words)["name"]
        (target / "written").write_text(backend)
        assert keys[backend] in lamina(root, "umount", target).stderr
    assert_fails(root, "mount", "app:1", target, "--rw", code=2, says="copy and overlay")
    lamina(root, "snapshots", "rm", keys["overlay"])
    # Only one is left: it is meant, though new ones would be made in the other backend.
    lamina(root, "mount", "app:1", target, "--rw")
    assert (target / "written").read_text() == "copy"
    lamina(root, "umount", target)
    assert_fails(root, "snapshots", "rm", CHAIN[-1], code=2, says="is in overlay and copy")


def test_what_is_kept_is_not_for_another_image(stocked: Path, target: Path, other_image: Path):
    key = lamina_json(stocked, "mount", "app:1", target, "--rw")["name"]
    lamina(stocked, "umount", target)
    lamina(stocked, "import", "--replace", other_image)
    done = lamina(stocked, "mount", "app:1", target, "--rw", code=4)
    assert_one_line(done.stderr, f"what is kept as {key}")
    assert_fails(stocked, "mount", key, target, "--snapshotter", "copy", code=2, says="has its name")
    assert not os.path.ismount(target)
    lamina(stocked, "mount", key, target)
    assert (target / "etc/name").exists()
    lamina(stocked, "umount", target)


# -- options ----------------------------------------------------------------------------------


def _shown(target: Path) -> set[str]:
    done = subprocess.run(
        ["findmnt", "-n", "-o", "VFS-OPTIONS", target], capture_output=True, text=True, check=True
    )
    return set(done.stdout.strip().split(","))


@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_setuid_files_and_devices_mean_nothing_unless_asked(
    two_backends: Path, target: Path, backend: str, rw: bool
):
    more = ["--rw"] if rw else []
    words = ("mount", "app:1", target, "--snapshotter", backend, *more)
    for options, has, lacks in (
        ([], {"nosuid", "nodev"}, {"noexec"}),
        (["-o", "suid,dev"], set(), {"nosuid", "nodev"}),
        (["-o", "noexec", "-o", "noatime"], {"nosuid", "nodev", "noexec", "noatime"}, set()),
    ):
        lamina(two_backends, *words, *options)
        shown = _shown(target)
        lamina(two_backends, "umount", target)
        assert shown >= has
        assert not shown & lacks
        assert ("rw" in shown) is rw


def test_options_that_could_swap_layers_are_refused(stocked: Path, target: Path):
    for option in ("lowerdir=/", "upperdir=/tmp", "no-such"):
        words = ("mount", "app:1", target, "-o", option)
        assert_fails(stocked, *words, code=2, says="mount option")
    assert_fails(stocked, "mount", "app:1", target, "-o", "rw", code=2, says="--rw")


def test_platform_chooses(tmp_path: Path, target: Path):
    index = tmp_path / "index"
    for architecture in ("amd64", "s390x"):
        platform = {"os": "linux", "architecture": architecture}
        layout(index, [archive(member(architecture))], platform=platform)
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", "--platform", "linux/s390x", index)
    lamina(root, "mount", "index:latest", target, "--platform", "linux/s390x")
    assert [path.name for path in target.iterdir()] == ["s390x"]
    lamina(root, "umount", target)


# -- other file systems, files that resist ----------------------------------------------------


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_a_store_on_another_file_system(
    tmp_path: Path, target: Path, image: Path, kind: str, backend: str
):
    disk = tmp_path / "disk"
    disk.mkdir()
    with formatted(kind, tmp_path / "image", disk):
        root = disk / "root"
        lamina(root, "import", image, "--snapshotter", backend)
        for words in ([], ["--rw"]):
            choice = ("--snapshotter", backend)
            key = lamina_json(root, "mount", "app:1", target, *choice, *words)["name"]
            assert_fails(root, "snapshots", "rm", key, code=6, says="is mounted")
            assert_fails(root, "snapshots", "rm", CHAIN[-1], code=6, says="snapshot")
            assert lamina_json(root, "gc")["snapshots"] == []
            assert (target / "etc/name").read_text() == "upper\n"
            lamina(root, "umount", target)
            assert not os.path.ismount(target)


def test_a_file_that_cannot_be_deleted_stops_nothing_else(stocked: Path, target: Path, tmp_path: Path):
    keys = [f"kept{number}" for number in range(3)]
    for key in keys:
        lamina(stocked, "mount", "app:1", target, "--rw", "--name", key)
        (target / "written").write_text(key)
        lamina(stocked, "umount", target)
    stuck, _ = sorted((stocked / "snapshots/overlay").glob("*/fs/written"))[:2]
    subprocess.run(["chattr", "+i", stuck], check=True)
    place = stocked / "trash" / f"overlay-{stuck.parts[-3]}"
    try:
        done = lamina(stocked, "snapshots", "rm", *keys, code=6)
        assert_one_line(done.stderr, f"files stay in {place}")
        assert _keys(stocked) == set()
        assert len(list((stocked / "snapshots/overlay").iterdir())) == len(CHAIN)
        lamina(stocked, "image", "rm", "app:1")
        gone = lamina(stocked, "gc", code=1)
        assert f"files stay in {place}" in gone.stderr
        assert "removed 4 blobs" in gone.stderr
        again = json.loads(lamina(stocked, "gc", "--json", code=1).stdout)
        assert [row["path"] for row in again["left"]] == [str(place)]
        assert f"files stay in {place}" in again["error"]["message"]
    finally:
        for path in (stuck, *place.rglob("written")):
            subprocess.run(["chattr", "-i", path], check=False, capture_output=True)
    lamina(stocked, "gc")
    assert {name: records for name, records in dump(stocked).items() if records} == {}


def test_removing_one_snapshot_deletes_no_others_files(
    stocked: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.stores.recover", lambda *_: None)  # that deletes what a crash left
    for key in ("one", "two"):
        lamina(stocked, "mount", "app:1", target, "--rw", "--name", key)
        lamina(stocked, "umount", target)
    third = tmp_path / "third"
    third.mkdir()
    lamina(stocked, "mount", "app:1", third)
    lamina(stocked, "snapshots", "rm", "one", failpoints="trash.moved=kill", code=-9)
    assert [row["number"] for row in dump(stocked)["trash"]]
    before = dump(stocked)["trash"]
    lamina(stocked, "snapshots", "rm", "two")
    lamina(stocked, "umount", third)
    assert dump(stocked)["trash"] == before
    lamina(stocked, "gc")
    assert dump(stocked)["trash"] == []


# -- crashes ----------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("healer", ["mount", "gc", "umount"])
@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize(
    "point",
    ["mount.recorded", "mount.prepared", "mount.activated", "umount.done", "snapshot.prepare.made"],
)
def test_dying_in_between_is_healed(stocked: Path, target: Path, point: str, rw: bool, healer: str):
    words = ["mount", "app:1", str(target), *(["--rw"] if rw else [])]
    if point == "umount.done":
        lamina(stocked, *words)
        words = ["umount", str(target)]
    code, _ = Victim(stocked, words, f"{point}=kill").wait()
    assert code == -9
    # What was made before there was anything to keep is no mount.
    whole = rw and point not in {"mount.recorded", "snapshot.prepare.made"}
    if healer == "mount":
        lamina(stocked, "mount", "app:1", target)
        lamina(stocked, "umount", target)
    elif healer == "umount":
        lamina(stocked, "umount", target)
    lamina(stocked, "gc")
    assert not os.path.ismount(target)
    assert [state for _, state in _mounts(stocked)] == ["kept"] * whole
    assert len(_keys(stocked)) == whole
    left = dump(stocked)
    assert left["leases"] == left["lease_items"] == left["trash"] == []


@pytest.mark.crash
def test_a_mount_that_outlived_its_command_and_is_in_use_is_a_mount(stocked: Path, target: Path):
    Victim(stocked, ["mount", "app:1", str(target)], "mount.activated=kill").wait()
    with _someone_in(target) as pid:
        lamina(stocked, "gc")
        assert [state for _, state in _mounts(stocked)] == ["mounted"]
        assert_fails(stocked, "umount", target, code=6, says=f"(pid {pid}, ")
    lamina(stocked, "umount", target)
    assert _keys(stocked) == set()


@pytest.mark.crash
def test_dying_while_it_goes_out_of_sight_frees_nothing(stocked: Path, target: Path):
    key = lamina_json(stocked, "mount", "app:1", target)["name"]
    with _someone_in(target):
        Victim(stocked, ["umount", "--lazy", str(target)], "umount.done=kill").wait()
        assert lamina_json(stocked, "gc")["snapshots"] == []
        assert _mounts(stocked) == [(key, "lazy")]
