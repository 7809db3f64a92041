"""The mount commands in process: what mounts promise, and that what failed leaves nothing."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import failpoints
from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.kv.schema import MOUNTS, MountRecord, now
from engine.metadata.mounts import MountState
from engine.mount import Mount, activate, mounted
from engine.mounts import mounting
from engine.mounts.claims import Claims
from engine.mounts.mounting import Order
from engine.mounts.table import boot_id, here, is_mounted
from engine.processes import pid_namespace
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
    assert len(folders) == len(stores.snapshotter(name).walk())
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


def test_what_others_mounted_where_a_command_died_is_theirs(stores: Stores, target: Path) -> None:
    """It died before it mounted anything: what is there now is not its to undo."""
    record = MountRecord(
        key="died",
        target=str(target),
        backend="overlay",
        rw=False,
        image="image:1",
        top="",
        state=MountState.CHANGING,
        created=now(),
        boot=boot_id(),
        space=here(),
        processes=pid_namespace(),
        lease="ended",
    )
    with stores.root.meta.write() as txn:
        MOUNTS.put(txn, record, "default", record.key)
    with mounted([Mount(type="tmpfs", source="theirs", options=[])], target):
        (target / "file").touch()
        stores.mounting.claims.heal()
        assert (target / "file").exists()
    assert stores.mounting.walk() == []


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
