"""The mount commands in process: what mounts promise, and that what failed leaves nothing."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine import failpoints
from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from engine.kv.schema import MOUNTS, SNAPSHOTS, MountRecord, now
from engine.metadata.mounts import MountState, MountStore
from engine.mount import Mount, activate, deactivate, mounted
from engine.mounts import mounting
from engine.mounts.claims import Claims, placed
from engine.mounts.mounting import Order
from engine.mounts.table import MountTable, here, is_mounted
from engine.processes import boot_id, pid_namespace
from engine.snapshots import Kind
from engine.stores import Stores
from engine.testing.archives import archive, member
from tests.support import apply_stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

BACKENDS = ("overlay", "copy")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def order(stores: Stores, backend_name: str, target: Path, **more: Any) -> Order:
    backend = stores.snapshotter(backend_name)
    layers = [archive(member("file", data=b"x")), archive(member("other"))]
    top = next(
        (i.key for i in backend.walk() if i.parent and i.kind is Kind.COMMITTED), ""
    ) or apply_stack(backend, layers)
    return Order(target=target, backend=backend, image="image:1", top=top, **more)


def flags(target: Path) -> int:
    return os.statvfs(target).f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)


FLAGS = {
    (): os.ST_NOSUID | os.ST_NODEV,
    ("noexec",): os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC,
    ("suid",): os.ST_NODEV,
    ("dev",): os.ST_NOSUID,
    ("dev", "suid"): 0,
}


@pytest.mark.parametrize("name", BACKENDS)
def test_setuid_files_and_devices_mean_nothing_unless_asked(
    name: str, stores: Stores, target: Path
) -> None:
    for options, expected in FLAGS.items():
        for rw in (False, True):
            stores.mounting.mount(order(stores, name, target, rw=rw, options=options))
            shown = flags(target)
            stores.umount(target)
            assert shown == expected | (0 if rw else os.ST_RDONLY), (options, rw)


def left(stores: Stores, name: str) -> list[str]:
    """Return the snapshots and folders beyond the two committed ones, and what is in the trash."""
    folders = sorted((stores.root.snapshots / name).iterdir())
    keys = [info.key for info in stores.snapshotter(name).walk() if info.kind != "committed"]
    assert len(folders) == len(list(stores.snapshotter(name).walk()))
    return [*keys, *(str(path) for path in stores.root.trash.iterdir())]


def fails(*_arguments: object, **_more: object) -> None:
    raise FailedPrecondition("it fails")


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "mount.recorded": lambda _: failpoints.arm("mount.recorded=error"),
    "mount.prepared": lambda _: failpoints.arm("mount.prepared=error"),
    "mount.activated": lambda _: failpoints.arm("mount.activated=error"),
    "activate": lambda patch: patch.setattr(mounting, "activate", fails),
    "complete": lambda patch: patch.setattr(Claims, "complete", fails),
}


def each_failure(stores: Stores, wanted: Order, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Fail to mount in each way; yield which it was, with nothing mounted."""
    for way, begin in WAYS.items():
        with monkeypatch.context() as patch:
            begin(patch)
            with pytest.raises(EngineError, match="fail"):
                stores.mounting.mount(wanted)
        assert not is_mounted(wanted.target), way
        yield way


@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_mount_that_fails_is_taken_back(
    name: str, rw: bool, stores: Stores, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = order(stores, name, target, rw=rw, name="mine")
    for way in each_failure(stores, wanted, monkeypatch):
        assert stores.mounting.walk() == [], way
        assert left(stores, name) == [], way
    stores.mounting.mount(wanted)  # and nothing is in its way
    stores.umount(target)
    assert left(stores, name) == (["mine"] if rw else [])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_kept_mount_is_kept_when_it_cannot_be_mounted_again(
    name: str, stores: Stores, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = order(stores, name, target, rw=True, name="mine")
    stores.mounting.mount(wanted)
    (target / "written").touch()
    kept = stores.umount(target)
    assert kept.state == MountState.KEPT
    for way in each_failure(stores, wanted, monkeypatch):
        assert stores.mounting.walk() == [kept], way
        assert left(stores, name) == ["mine"], way
    stores.mounting.mount(wanted)
    assert (target / "written").exists()
    stores.umount(target)


def test_what_a_target_must_be(stores: Stores, target: Path) -> None:
    with pytest.raises(NotFound, match="not a folder"):
        stores.mounting.mount(order(stores, "copy", target / "nowhere"))
    stores.mounting.mount(order(stores, "copy", target, name="taken"))
    with pytest.raises(FailedPrecondition, match="something is mounted"):
        stores.mounting.mount(order(stores, "copy", target))
    other = target.with_name("other")
    other.mkdir()
    with pytest.raises(AlreadyExists, match="named taken"):
        stores.mounting.mount(order(stores, "copy", other, name="taken"))
    store = stores.root.path
    for within in (store, store / "trash", store.parent, Path("/")):
        with pytest.raises(InvalidArgument, match="overlap; mount somewhere else"):
            stores.mounting.ready(within)
    assert left(stores, "copy") == ["taken"]
    stores.umount(target)
    assert left(stores, "copy") == []


def test_an_interrupt_just_after_the_kernel_mounted_leaves_nothing(
    stores: Stores, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        activate(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(mounting, "activate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stores.mounting.mount(order(stores, "overlay", target))
    assert not is_mounted(target)
    assert (stores.mounting.walk(), left(stores, "overlay")) == ([], [])


def died_at(target: Path, key: str, space: int) -> MountRecord:
    """Return the record of a command that was killed before it mounted anything."""
    return MountRecord(
        key=key,
        target=str(target),
        backend="overlay",
        rw=False,
        image="image:1",
        top="",
        state=MountState.CHANGING,
        created=now(),
        boot=boot_id(),
        space=space,
        processes=pid_namespace(),
        lease="ended",
    )


def note(stores: Stores, *records: MountRecord) -> None:
    with stores.root.meta.write() as txn:
        for record in records:
            MOUNTS.put(txn, record, "default", record.key)


def test_what_others_mounted_where_a_command_died_is_theirs(stores: Stores, target: Path) -> None:
    """It died before it mounted anything: what is there now is not its to undo."""
    note(stores, died_at(target, "died", here()))
    with mounted([Mount(type="tmpfs", source="theirs", options=[])], target):
        (target / "file").touch()
        stores.mounting.claims.heal()
        assert (target / "file").exists()
    assert stores.mounting.walk() == []


@pytest.mark.parametrize("space", [here(), here() + 1], ids=["here", "elsewhere"])
def test_who_clears_what_died_leaves_what_is_just_being_mounted_there(
    space: int, stores: Stores, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mounted, of this store, and no record says so yet."""

    def others_clear(*arguments: Any) -> None:
        activate(*arguments)
        note(stores, died_at(target, "died", space))
        stores.mounting.claims.heal()

    monkeypatch.setattr(mounting, "activate", others_clear)
    stores.mounting.mount(order(stores, "overlay", target, name="mine"))
    assert (target / "file").read_bytes() == b"x"
    assert [(r.key, r.state) for r in stores.mounting.walk()] == [("mine", MountState.MOUNTED)]
    stores.umount(target)


def test_a_number_of_another_boot_names_no_mount(stores: Stores, target: Path) -> None:
    """The kernel gives the same numbers again: a record of before stays with its own target."""
    stores.mounting.mount(order(stores, "overlay", target))
    (record,) = stores.mounting.walk()
    table = MountTable.read_own()
    moved = replace(record, target="/before")
    before = replace(moved, boot="another")
    assert placed(moved, table) == record
    assert placed(before, table) == before
    assert stores.mounting.claims.state(before, table) is None
    stores.umount(target)


def test_a_mount_that_cannot_be_seen_from_here_may_be_there(stores: Stores, target: Path) -> None:
    """Of another mount namespace, in a pid namespace whose processes /proc does not show."""
    stores.mounting.mount(order(stores, "overlay", target))
    (record,) = stores.mounting.walk()
    stores.umount(target)
    table = MountTable.read_own()
    hidden = replace(record, space=record.space + 1, processes=record.processes + 1)
    assert stores.mounting.claims.state(hidden, table) is MountState.MOUNTED
    for seen in (record, replace(hidden, processes=record.processes), replace(hidden, space=here())):
        assert stores.mounting.claims.state(seen, table) is None
    assert stores.mounting.claims.state(hidden, dataclasses.replace(table, sees_all=True)) is None


def test_what_others_mounted_over_ours_is_not_unmounted(stores: Stores, target: Path) -> None:
    stores.mounting.mount(order(stores, "overlay", target))
    with mounted([Mount(type="tmpfs", source="theirs", options=[])], target):
        (target / "theirs").touch()
        for lazy in (False, True):
            with pytest.raises(FailedPrecondition, match="is not lamina's; unmount that first"):
                stores.umount(target, lazy=lazy)
        assert (target / "theirs").exists()
    stores.umount(target)
    assert not is_mounted(target)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "error", [PermissionDenied("no"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"]
)
def test_an_unmount_that_fails_leaves_a_mount_like_any_other(
    error: BaseException,
    lazy: bool,
    stores: Stores,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no(*_arguments: object, **_more: object) -> None:
        raise error

    stores.mounting.mount(order(stores, "overlay", target, rw=True))
    (record,) = stores.mounting.walk()
    with monkeypatch.context() as patch:
        patch.setattr(mounting, "deactivate", no)
        with pytest.raises(type(error)):
            stores.umount(target, lazy=lazy)
    assert stores.mounting.walk() == [record]
    stores.mounting.claims.heal()
    assert is_mounted(target)
    assert stores.umount(target).state == MountState.KEPT


def test_what_others_mount_once_the_target_is_claimed_is_theirs(
    stores: Stores, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = order(stores, "overlay", target)
    theirs = Mount(type="tmpfs", source="theirs", options=[])

    def others(point: str) -> None:
        if point == "mount.recorded":
            activate([theirs], target)

    monkeypatch.setattr(mounting, "hit", others)
    with pytest.raises(FailedPrecondition, match="something is mounted at"):
        stores.mounting.mount(wanted)
    try:
        assert MountTable.read_own().on_top(target).source == "theirs"  # type: ignore[union-attr]
        assert (stores.mounting.walk(), left(stores, "overlay")) == ([], [])
    finally:
        deactivate(target)


def test_a_view_in_use_out_of_sight_outlives_an_unmount_that_died(stores: Stores, target: Path) -> None:
    wanted = order(stores, "overlay", target, name="mine")
    stores.mounting.mount(wanted)
    (record,) = stores.mounting.walk()
    note(stores, replace(record, state=MountState.CHANGING, lease="ended"))
    with (target / "file").open() as inside:
        deactivate(target, lazy=True)  # somebody's umount -l
        came = stores.remove_snapshots([(wanted.backend, "mine")])
        assert came.count == 0
        assert "still in use by" in str(came.failed)
        assert left(stores, "overlay") == ["mine"]
        assert inside.read() == "x"
    assert stores.remove_snapshots([(wanted.backend, "mine")]).count == 1


def test_a_record_is_changed_only_as_it_was_read(stores: Stores, target: Path) -> None:
    records = MountStore(stores.root.meta, "default")
    read = died_at(target, "mine", here())
    since = replace(read, lease="of another")
    note(stores, since)
    assert not records.swap(read, replace(read, state=MountState.KEPT))
    assert not records.drop(read)
    with (
        pytest.raises(FailedPrecondition, match="is being changed"),
        records.claimed(read, over=read),
    ):
        pass
    assert records.walk() == [since]
    assert records.drop(since)
    assert not records.swap(since, read)
    assert records.walk() == []


def test_a_target_that_is_a_link_is_what_it_leads_to(stores: Stores, target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    assert stores.mounting.mount(order(stores, "overlay", link)).target == str(target)
    assert [(r.target, r.state) for r in stores.mounting.walk()] == [(str(target), MountState.MOUNTED)]
    stores.umount(link)
    assert (is_mounted(target), stores.mounting.walk()) == (False, [])


def test_a_snapshot_of_the_same_name_in_another_backend_is_no_mount(
    stores: Stores, target: Path
) -> None:
    wanted = order(stores, "overlay", target, rw=True, name="mine")
    copy = stores.snapshotter("copy")
    stores.mounting.mount(wanted)
    for is_kept in (False, True):
        if is_kept:
            stores.umount(target)
        before = stores.mounting.walk()
        copy.prepare("mine")
        assert stores.remove_snapshots([(copy, "mine")]).failed is None
        assert stores.mounting.walk() == before
    assert left(stores, "overlay") == ["mine"]


def test_a_snapshot_that_was_never_whole_is_not_kept(stores: Stores, target: Path) -> None:
    """Who mounted it writable was killed while its files were copied."""
    wanted = order(stores, "copy", target)
    wanted.backend.prepare("died", wanted.top)
    with stores.root.meta.write() as txn:
        made = SNAPSHOTS.get(txn, "copy", "default", "died")
        assert made is not None
        SNAPSHOTS.put(txn, replace(made, lease="ended"), "copy", "default", "died")
    note(stores, replace(died_at(target, "died", here()), backend="copy", rw=True))
    assert stores.mounting.walk() == []
    stores.mounting.claims.heal()
    assert (stores.mounting.walk(), left(stores, "copy")) == ([], [])
