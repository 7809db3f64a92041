"""Records of mounts against all that may have happened since: others at work, damage, many of them."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from engine.errors import EngineError, FailedPrecondition, Unavailable
from engine.kv import keys
from engine.kv.schema import MOUNTS, MountRecord
from engine.mounts import holders
from engine.mounts.table import MountTable
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.stores import Stores, host_platform, open_stores
from tests.cli.failing import assert_fails, assert_one_line
from tests.cli.test_commands import CHAIN
from tests.command import dump, lamina, lamina_json
from tests.processes import Victim

pytestmark = pytest.mark.root


@contextmanager
def _opened(root: Path, namespace: str = "default") -> Iterator[Stores]:
    with open_stores(root, namespace, host_platform()) as stores:
        yield stores


def _states(root: Path, *namespace: str) -> dict[str, str]:
    return {row["name"]: row["state"] for row in lamina_json(root, *namespace, "mounts")}


def _kept(root: Path, target: Path, name: str) -> None:
    lamina(root, "mount", "app:1", target, "--rw", "--name", name)
    (target / "written").write_text(name)
    lamina(root, "umount", target)


def _change(root: Path, key: str, **fields: object) -> None:
    with Root(root) as opened, opened.meta.write() as txn:
        record = MOUNTS.get(txn, "default", key)
        assert record is not None
        MOUNTS.put(txn, msgspec.structs.replace(record, **fields), "default", key)


def _damage(root: Path, key: str) -> None:
    with Root(root) as opened, opened.meta.write() as txn:
        txn.raw.put(keys.encode(["default", key]), b"\x80", db=txn.databases[MOUNTS.name])


def _assert_stays(
    stores: Stores, backend: Snapshotter, key: str, kind: type[EngineError], says: str
) -> None:
    came = stores.remove_snapshots([(backend, key)])
    assert (came.count, came.left) == (0, [])
    assert isinstance(came.failed, kind)
    assert says in str(came.failed)


def _after_reading(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> Callable[[], int]:
    """Let something happen as soon as the table was read first; give how often it was read."""
    read = MountTable.read
    count = 0

    def counted() -> MountTable:
        nonlocal count
        count += 1
        table = read()
        if count == 1:
            happens()
        return table

    monkeypatch.setattr(MountTable, "read", counted)
    return lambda: count


# -- others at work ---------------------------------------------------------------------------


def test_what_another_process_mounts_meanwhile_is_not_removed(
    stocked: Path, target: Path, monkeypatch: pytest.MonkeyPatch
):
    _kept(stocked, target, "web")
    _after_reading(monkeypatch, lambda: lamina(stocked, "mount", "web", target))
    with _opened(stocked) as stores:
        overlay = stores.snapshotter("overlay")
        _assert_stays(stores, overlay, "web", FailedPrecondition, "is being changed; try again")
    assert (target / "written").read_text() == "web"
    (target / "more").touch()
    assert _states(stocked) == {"web": "mounted"}
    assert_fails(stocked, "snapshots", "rm", "web", code=6, says="is mounted")
    lamina(stocked, "umount", target)


def test_what_another_process_died_mounting_meanwhile_is_not_removed(
    stocked: Path, target: Path, monkeypatch: pytest.MonkeyPatch
):
    _kept(stocked, target, "web")

    def die() -> None:
        assert Victim(stocked, ["mount", "web", str(target)], "mount.activated=kill").wait()[0] == -9

    _after_reading(monkeypatch, die)
    with _opened(stocked) as stores:
        overlay = stores.snapshotter("overlay")
        _assert_stays(stores, overlay, "web", FailedPrecondition, "is being changed; try again")
        assert (target / "written").read_text() == "web"
        assert stores.remove_snapshots([(overlay, "web")]).count == 1
    assert not os.path.ismount(target)
    assert _states(stocked) == {}


def test_what_happens_to_a_namespace_is_not_another_s(stocked: Path, target: Path, image: Path):
    """Its vanished mount and its crashed one block no target, and its `gc` leaves others' mounts."""
    team = ("--namespace", "team")
    lamina(stocked, *team, "import", "--snapshotter", "overlay", image)
    for how in ("vanished", "crashed", "crashed before it mounted"):
        if how == "vanished":
            lamina(stocked, "mount", "app:1", target)
            subprocess.run(["umount", target], check=True)
        elif how == "crashed":
            Victim(stocked, ["mount", "app:1", str(target)], "mount.activated=kill").wait()
            done = lamina(stocked, *team, "mount", "app:1", target, code=6)
            assert_one_line(done.stderr, "something is mounted")
            subprocess.run(["umount", target], check=True)
        else:
            Victim(stocked, ["mount", "app:1", str(target)], "mount.prepared=kill").wait()
        lamina(stocked, *team, "mount", "app:1", target)
        lamina(stocked, "gc")
        assert os.path.ismount(target), how
        assert _states(stocked) == {}
        assert list(_states(stocked, *team).values()) == ["mounted"]
        lamina(stocked, *team, "umount", target)
    left = dump(stocked)
    assert (left["mounts"], left["trash"]) == ([], [])


# -- a mount whose place is another by now ------------------------------------------------------


def _unshared(script: str, *arguments: object) -> str:
    """Run a script in a mount namespace that ends with it, and give what it wrote."""
    command = ["unshare", "-m", sys.executable, "-P", "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rw", [True, False])
def test_a_mount_whose_parent_was_renamed_is_mounted(stocked: Path, tmp_path: Path, rw: bool):
    old, new, other = tmp_path / "p", tmp_path / "q", tmp_path / "other"
    for folder in (old / "t", other):
        folder.mkdir(parents=True)
    lamina(stocked, "mount", "app:1", old / "t", *(["--rw"] if rw else []), "--name", "one")
    old.rename(new)
    (row,) = lamina_json(stocked, "mounts")
    assert (row["state"], row["target"]) == ("mounted", str(new / "t"))
    assert lamina_json(stocked, "gc")["snapshots"] == []
    rm = f"run `lamina umount {new}/t` first"
    assert_fails(stocked, "snapshots", "rm", "one", code=6, says=rm)
    assert_fails(stocked, "mount", "app:1", other, "--name", "one", code=4, says=f"at {new}/t")
    assert_fails(stocked, "umount", old / "t", code=6, says=f"was moved to {new}/t")
    with (new / "t/etc/name").open():
        assert_fails(stocked, "umount", new / "t", code=6, says=f"{new}/t is in use by")
    assert _states(stocked) == {"one": "mounted"}
    lamina(stocked, "umount", new / "t")
    assert not os.path.ismount(new / "t")
    rows = lamina_json(stocked, "mounts")
    assert [(row["state"], row["target"]) for row in rows] == ([("kept", f"{new}/t")] if rw else [])


def test_a_mount_that_was_renamed_and_back_is_unmounted(stocked: Path, tmp_path: Path):
    old, new = tmp_path / "p", tmp_path / "q"
    (old / "t").mkdir(parents=True)
    lamina(stocked, "mount", "app:1", old / "t", "--rw", "--name", "one")
    old.rename(new)
    lamina(stocked, "gc")
    # The path is free for another, which is then what its name means.
    (old / "t").mkdir(parents=True)
    lamina(stocked, "mount", "app:1", old / "t", "--name", "two")
    assert _states(stocked) == {"one": "mounted", "two": "mounted"}
    lamina(stocked, "umount", old / "t")
    assert _states(stocked) == {"one": "mounted"}
    (old / "t").rmdir()
    old.rmdir()
    new.rename(old)
    lamina(stocked, "umount", old / "t")
    assert _states(stocked) == {"one": "kept"}


def test_dying_at_an_unmount_elsewhere_is_healed(stocked: Path, tmp_path: Path):
    old, new = tmp_path / "p", tmp_path / "q"
    (old / "t").mkdir(parents=True)
    lamina(stocked, "mount", "app:1", old / "t", "--rw", "--name", "one")
    _change(stocked, "one", state="changing", lease="dead")
    old.rename(new)
    lamina(stocked, "gc")
    assert not os.path.ismount(new / "t")
    assert [row["state"] for row in dump(stocked)["mounts"]] == ["kept"]


_MOVED = """
import subprocess, sys
from pathlib import Path
from tests.command import lamina, lamina_json
root, folder = map(Path, sys.argv[1:])
source, target = folder / "s", folder / "t"
source.mkdir(); target.mkdir()
lamina(root, "mount", "app:1", source, "--name", "view")
subprocess.run(["mount", "--move", source, target], check=True)
(row,) = lamina_json(root, "mounts")
assert (row["state"], row["target"]) == ("mounted", str(target)), row
assert lamina_json(root, "gc")["snapshots"] == []
assert (target / "etc/name").read_text() == "upper\\n"
lamina(root, "umount", source, code=6)
lamina(root, "umount", target)
assert lamina_json(root, "mounts") == []
"""


def test_a_mount_that_was_moved_is_mounted(stocked: Path, tmp_path: Path):
    _unshared(_MOVED, stocked, tmp_path)


_IN_CHROOT = """
import json, subprocess, sys
from pathlib import Path
from tests.command import LAMINA, lamina, lamina_json
root, folder = map(Path, sys.argv[1:])
jail, inside, outside = folder / "jail", folder / "in", folder / "out"
for place in (jail, inside, outside):
    place.mkdir()
subprocess.run(["mount", "--rbind", "/", jail], check=True)

def in_jail(*words, code=0):
    command = ["chroot", jail, *LAMINA, "--root", root, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done
    return done.stdout

def shown():
    return {row["name"]: (row["state"], row["target"]) for row in lamina_json(root, "mounts")}

in_jail("mount", "app:1", inside, "--rw", "--name", "in")
assert shown() == {"in": ("mounted", f"{jail}{inside}")}
lamina(root, "gc")
assert f"moved to {jail}{inside}" in lamina(root, "umount", inside, code=6).stderr
lamina(root, "mount", "app:1", outside, "--rw", "--name", "out")
in_jail("gc")
assert [row["state"] for row in json.loads(in_jail("mounts", "--json"))] == ["mounted"] * 2
in_jail("umount", outside, code=6)
assert shown()["out"] == ("mounted", str(outside))
in_jail("umount", inside)
lamina(root, "umount", outside)
assert {state for state, _ in shown().values()} == {"kept"}
"""


def test_a_mount_is_mounted_for_every_root(stocked: Path, tmp_path: Path):
    _unshared(_IN_CHROOT, stocked, tmp_path)


# -- a look that was cut off ------------------------------------------------------------------


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(holders, "_SECONDS", -1.0)
    return monkeypatch


@pytest.mark.parametrize("rw", [False, True])
def test_who_was_not_looked_for_is_taken_to_be_there(
    stocked: Path, target: Path, rw: bool, no_time: pytest.MonkeyPatch
):
    key = lamina_json(stocked, "mount", "app:1", target, *(["--rw"] if rw else []))["name"]
    inside = os.open(target, os.O_RDONLY)
    try:
        subprocess.run(["umount", "-l", target], check=True)
        with _opened(stocked) as stores:
            overlay = stores.snapshotter("overlay")
            assert stores.collect().snapshots == []
            assert overlay.stat(key)
            _assert_stays(stores, overlay, key, Unavailable, "looking at all processes takes")
            with pytest.raises(Unavailable, match="looking at all processes takes"):
                stores.umount(target)
            stores.mounting.ready(target)  # a mount there is nobody's hindrance
        assert os.stat("etc/name", dir_fd=inside)
    finally:
        os.close(inside)
    no_time.undo()
    lamina(stocked, "gc")
    assert _states(stocked) == ({key: "kept"} if rw else {})


def test_a_busy_mount_says_that_its_users_were_not_found(
    stocked: Path, target: Path, no_time: pytest.MonkeyPatch
):
    lamina(stocked, "mount", "app:1", target)
    with (
        (target / "etc/name").open(),
        _opened(stocked) as stores,
        pytest.raises(FailedPrecondition, match=r"in use by someone \(.*looking at all"),
    ):
        stores.umount(target)
    lamina(stocked, "umount", target)


# -- damage -----------------------------------------------------------------------------------


def test_a_damaged_record_is_a_row_and_stops_nobody(stocked: Path, target: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    _kept(stocked, target, "lost")
    lamina(stocked, "mount", "app:1", other, "--name", "view")
    _damage(stocked, "lost")
    view, lost = lamina_json(stocked, "mounts")
    assert (view["name"], view["state"]) == ("view", "mounted")
    assert (lost["name"], "a record of mounts cannot be read" in lost["error"]) == ("lost", True)
    assert "a record of mounts cannot be read" in lamina(stocked, "mounts").stdout
    lamina(stocked, "umount", other)
    lamina(stocked, "mount", "app:1", target)
    lamina(stocked, "umount", target)
    gone = lamina_json(stocked, "gc")
    assert gone["snapshots"] == lamina_json(stocked, "gc", "--dry-run")["snapshots"] == []
    assert [error.partition(":")[0] for error in gone["errors"]] == ["mount lost"]
    assert "lamina: kept: mount lost: " in lamina(stocked, "gc").stderr
    assert_fails(stocked, "mount", "app:1", target, "--name", "lost", code=5, says="cannot be read")
    lamina(stocked, "snapshots", "rm", "lost")
    assert lamina_json(stocked, "mounts") == lamina_json(stocked, "gc")["errors"] == []


def test_what_a_damaged_record_mounted_is_not_removed(stocked: Path, target: Path):
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", "lost")
    _damage(stocked, "lost")
    assert_fails(stocked, "snapshots", "rm", "lost", code=6, says="is mounted")
    assert_fails(stocked, "umount", target, code=3, says="mounted nothing")
    subprocess.run(["umount", target], check=True)
    lamina(stocked, "snapshots", "rm", "lost")


def test_damage_below_a_record_stops_nobody(stocked: Path, target: Path):
    """The record of its snapshot, or of the lease of who was changing it."""
    _kept(stocked, target, "lost")
    _kept(stocked, target, "changed")
    _change(stocked, "changed", state="changing", lease="x")
    with Root(stocked) as root, root.meta.write() as txn:
        key = keys.encode(["overlay", "default", "lost"])
        txn.raw.put(key, b"\x80", db=txn.databases["snapshots"])
        txn.raw.put(keys.encode(["default", "x"]), b"\x80", db=txn.databases["leases"])
    assert _states(stocked) == {"lost": "kept", "changed": "changing"}
    lamina(stocked, "gc")
    assert _states(stocked) == {"lost": "kept", "changed": "changing"}
    other = target.with_name("other")
    other.mkdir()
    lamina(stocked, "mount", "app:1", other)
    lamina(stocked, "umount", other)


@pytest.mark.parametrize("how", ["mounted", "vanished"])
def test_a_backend_that_is_not_there_any_more_stops_no_umount(stocked: Path, target: Path, how: str):
    key = lamina_json(stocked, "mount", "app:1", target)["name"]
    _change(stocked, key, backend="zfs")
    (stocked / "snapshots" / "zfs").mkdir()
    if how == "vanished":
        subprocess.run(["umount", target], check=True)
    said = lamina(stocked, "umount", target).stderr
    assert f"unmounted; its snapshot {key} stays for a later `lamina gc`: no snapshotter 'zfs'" in said
    assert not os.path.ismount(target)
    assert "snapshots of zfs stay" in lamina(stocked, "gc").stderr
    again = lamina_json(stocked, "mount", "app:1", target)["name"]
    lamina(stocked, "umount", target)
    assert [row["key"] for row in dump(stocked)["mounts"]] == [key]
    _change(stocked, key, backend="overlay")
    assert [node["key"] for node in lamina_json(stocked, "gc")["snapshots"]] == [key]
    assert again != key


def test_files_that_stay_are_logged(stocked: Path, target: Path, caplog: pytest.LogCaptureFixture):
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", "web")
    for name in ("web", "own"):
        caplog.clear()
        with _opened(stocked) as stores:
            if name == "own":
                backend = stores.snapshotter("overlay")
                backend.prepare(name, CHAIN[-1])
            stuck = max((stocked / "snapshots/overlay").iterdir(), key=lambda path: int(path.name))
            (stuck / "fs" / "stuck").touch()
            subprocess.run(["chattr", "+i", stuck / "fs" / "stuck"], check=True)
            place = stocked / "trash" / f"overlay-{stuck.name}"
            try:
                with caplog.at_level(logging.WARNING, "engine"):
                    if name == "own":
                        stores.release(name)
                    else:
                        subprocess.run(["umount", target], check=True)
                        _change_to_view(stores, name)
                        stores.collect()
                assert f"stay in {place}: Operation not permitted" in caplog.text
            finally:
                for path in (stuck, place):
                    subprocess.run(["chattr", "-R", "-i", path], check=False, capture_output=True)


def _change_to_view(stores: Stores, key: str) -> None:
    with stores.root.meta.write() as txn:
        record = MOUNTS.get(txn, "default", key)
        assert record is not None
        MOUNTS.put(txn, msgspec.structs.replace(record, rw=False), "default", key)


# -- many -------------------------------------------------------------------------------------


def _records(stores: Stores, count: int) -> None:
    """Add records of views that vanished, each with its snapshot."""
    overlay = stores.snapshotter("overlay")
    with stores.root.meta.read() as txn:
        (model,) = MOUNTS.scan(txn)
    vanished = msgspec.structs.replace(
        model, rw=False, target=f"{model.target}/gone", mount_id=0, unique_id=0
    )
    made: list[MountRecord] = []
    for number in range(count):
        key = f"vanished-{number}"
        overlay.view(key, CHAIN[-1])
        made.append(msgspec.structs.replace(vanished, key=key))
    with stores.root.meta.write() as txn:
        for record in made:
            MOUNTS.put(txn, record, "default", record.key)


@pytest.mark.parametrize("many", [1, 30])
def test_the_table_is_read_once_for_a_command(
    stocked: Path, target: Path, many: int, monkeypatch: pytest.MonkeyPatch
):
    _kept(stocked, target, "web")
    lamina(stocked, "mount", "web", target)
    with _opened(stocked) as stores:
        overlay = stores.snapshotter("overlay")
        _records(stores, many)
        for number in range(many):
            overlay.prepare(f"own-{number}", CHAIN[-1])
        with monkeypatch.context() as patch:
            reads = _after_reading(patch, lambda: None)
            gone = stores.remove_snapshots([(overlay, f"own-{n}") for n in range(many)])
            assert (gone.count, gone.left, gone.failed) == (many, [], None)
            assert reads() == 1
        with monkeypatch.context() as patch:
            reads = _after_reading(patch, lambda: None)
            assert len(stores.collect().snapshots) == many
            assert reads() == 1
        with monkeypatch.context() as patch:
            reads = _after_reading(patch, lambda: None)
            stores.umount(target)
            assert reads() == 1


_AMONG_MANY = """
import subprocess, sys
from pathlib import Path
from engine.mount import Mount, activate
from tests.command import lamina, lamina_json
root, folder = map(Path, sys.argv[1:])
target, source = folder / "mnt", folder / "source"
source.mkdir()
for number in range(300):
    place = folder / "many" / str(number)
    place.mkdir(parents=True)
    kind = Mount(type="tmpfs", source="tmpfs", options=["size=16k"])
    bind = Mount(type="bind", source=str(source), options=["bind"])
    activate([kind if number % 2 else bind], place)
keys = []
for number in range(3):
    keys.append(lamina_json(root, "mount", "app:1", target, "--rw", "--name", f"k{number}")["name"])
    lamina(root, "snapshots", "rm", keys[-1], code=6)
    lamina(root, "umount", target)
lamina(root, "snapshots", "rm", *keys)
lamina(root, "mount", "app:1", target)
assert lamina_json(root, "gc")["snapshots"] == []
assert (target / "etc/name").read_text() == "upper\\n"
subprocess.run(["umount", target], check=True)
assert len(lamina_json(root, "gc")["snapshots"]) == 1
assert lamina_json(root, "mounts") == []
print("done")
"""


def test_among_hundreds_of_mounts(stocked: Path, target: Path, tmp_path: Path):
    assert _unshared(_AMONG_MANY, stocked, tmp_path) == "done\n"
