"""What could not be made is taken back, and what is in use is not emptied."""

import errno
import os
from pathlib import Path

import pytest

from engine import failpoints
from engine.errors import EngineError, FailedPrecondition, NotFound, ResourceExhausted
from engine.fs.removal import remove_entry
from engine.kv.schema import LEASE_ITEMS, LEASES
from engine.metadata.leases import leased
from engine.mount import Mount, activate, deactivate_below, mounted
from engine.snapshots import Commit
from engine.stores import Stores
from engine.testing.archives import archive, member
from snapshotters import base, discarding
from snapshotters.base import BaseSnapshotter
from tests.support import BACKENDS, apply_stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]


def full(*_arguments: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def check_nothing_left(stores: Stores, backend: BaseSnapshotter, keys: set[str]) -> None:
    assert {info.key for info in backend.walk()} == keys
    assert len(list((stores.root.snapshots / backend.name).iterdir())) == len(keys)
    assert list(stores.root.trash.iterdir()) == []
    assert backend._store.trash() == []


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", ["mkdir", "make_root", "_make", "half made"])
def test_a_snapshot_that_cannot_be_made_is_none(
    name: str, step: str, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stores.snapshotter(name)
    assert isinstance(backend, BaseSnapshotter)
    parent = apply_stack(backend, [archive(member("d/file", data=b"x"))])

    def half(_self: BaseSnapshotter, record: object, _below: object) -> None:
        (backend._tree(record) / "half").mkdir()  # type: ignore[arg-type]
        full()

    for make in (backend.prepare, backend.view):
        with monkeypatch.context() as patch:
            if step == "mkdir":
                patch.setattr(Path, "mkdir", full)
            elif step == "make_root":
                patch.setattr(base, "make_root", full)
            else:
                patch.setattr(type(backend), "_make", half if step == "half made" else full)
            with pytest.raises(ResourceExhausted, match="no space"):
                make("key", parent)
        check_nothing_left(stores, backend, {parent})
        make("key", parent)  # nor does it keep its key or its parent
        backend.remove("key")
        assert backend.cleanup() == []
    backend.remove(parent)


@pytest.mark.parametrize("point", ["snapshot.prepare.recorded", "snapshot.prepare.made"])
def test_without_a_lease_a_snapshot_is_held_by_one_of_its_own_until_it_is_made(
    point: str, stores: Stores
) -> None:
    backend = stores.snapshotter("overlay")
    with failpoints.armed(point, "error"), pytest.raises(EngineError, match="failpoint"):
        backend.prepare("key")
    with stores.root.meta.read() as txn:
        assert LEASES.scan(txn, "default") == []
        assert LEASE_ITEMS.scan(txn, "default") == []
    stores.collect()  # its lease is gone, and so is what only that held
    assert list(backend.walk()) == []
    assert list((stores.root.snapshots / "overlay").iterdir()) == []


def test_work_in_progress_is_kept_by_its_lease_alone(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    with leased(stores.root.meta, "default") as lease:
        backend.prepare("work", lease=lease)
        backend.prepare("whole")
        stores.collect()
        assert {info.key for info in backend.walk()} == {"work", "whole"}
    stores.collect()
    assert {info.key for info in backend.walk()} == {"whole"}


@pytest.mark.parametrize("name", ["overlay", "copy"])
def test_what_is_mounted_is_neither_removed_nor_emptied(
    name: str, stores: Stores, tmp_path: Path
) -> None:
    backend = stores.snapshotter(name)
    assert isinstance(backend, BaseSnapshotter)
    parent = apply_stack(backend, [archive(member("file", data=b"x"))])
    mounts = backend.prepare("key", parent)
    (tmp_path / "mnt").mkdir()
    with mounted(mounts, tmp_path / "mnt") as tree:
        (tree / "precious").write_text("x")
        with pytest.raises(FailedPrecondition, match="mounted"):
            backend.remove("key")
        assert backend.stat("key")
        # Its record is gone all the same, as by a process that did not see the mount.
        backend._store.remove("key")
        (left,) = backend.cleanup()
        assert left.reason == "it is mounted"
        assert (tree / "precious").read_text() == "x"
        assert (tree / "file").read_text() == "x"
    assert backend.cleanup() == []
    check_nothing_left(stores, backend, {parent})


def test_trash_that_is_in_use_is_not_emptied(stores: Stores, tmp_path: Path) -> None:
    # Moved to the trash by a process that died there, while it was mounted.
    backend = stores.snapshotter("copy")
    assert isinstance(backend, BaseSnapshotter)
    mounts = backend.prepare("key")
    place = Path(backend.sink("key").place)
    (tmp_path / "mnt").mkdir()
    with mounted(mounts, tmp_path / "mnt") as tree:
        (tree / "precious").write_text("x")
        backend._store.remove("key")
        place.rename(stores.root.trash / f"copy-{place.name}")
        (left,) = backend.cleanup()
        assert (left.path, left.reason) == (
            str(stores.root.trash / f"copy-{place.name}"),
            "it is mounted",
        )
        assert (tree / "precious").read_text() == "x"
    assert backend.cleanup() == []
    check_nothing_left(stores, backend, set())


def test_one_that_resists_does_not_keep_the_others(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stores.snapshotter("copy")
    assert isinstance(backend, BaseSnapshotter)
    for key in ("a", "b", "c"):
        backend.prepare(key)
    numbers = [backend.remove(key) for key in ("a", "b", "c")]

    def resists(folder: int, name: bytes, *, until: float) -> None:
        if name == b"copy-%d" % numbers[1]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        remove_entry(folder, name, until=until)

    with monkeypatch.context() as patch:
        patch.setattr(discarding, "remove_entry", resists)
        (left,) = backend.cleanup()
        assert left.path == str(stores.root.trash / f"copy-{numbers[1]}")
        assert left.reason == os.strerror(errno.EPERM)
        assert backend._store.trash() == [numbers[1]]
    assert backend.cleanup(only={numbers[0]}) == []
    assert backend._store.trash() == [numbers[1]]
    assert backend.cleanup() == []
    check_nothing_left(stores, backend, set())


def test_a_removal_ends_in_time_and_goes_on_later(stores: Stores) -> None:
    backend = stores.snapshotter("copy")
    assert isinstance(backend, BaseSnapshotter)
    backend.prepare("key")
    (Path(backend.sink("key").place) / "fs" / "file").touch()
    backend.remove("key")
    (left,) = backend.cleanup(seconds=-1)
    assert left.reason == "not finished yet"
    assert backend.cleanup(seconds=60) == []
    check_nothing_left(stores, backend, set())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_commit_that_fails_leaves_an_active_snapshot(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    backend.prepare("key")
    with (
        failpoints.armed("snapshot.commit.settled", "enospc"),
        pytest.raises((EngineError, OSError), match=r"space|failpoint"),
    ):
        backend.commit(Commit(name="done", key="key"))
    assert backend.stat("key")
    with pytest.raises(NotFound):
        backend.stat("done")
    backend.remove("key")
    assert backend.cleanup() == []


@pytest.mark.parametrize("name", BACKENDS)
def test_a_committed_snapshot_keeps_nothing_of_its_making(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    apply_stack(backend, [archive(member("d/a")), archive(member("d/b"))])
    for folder in (stores.root.snapshots / name).iterdir():
        assert set(os.listdir(folder)) - {"work"} == {"fs", "sealed"}


def test_what_a_trial_left_is_swept_and_one_under_way_is_not(stores: Stores, tmp_path: Path) -> None:
    # A process that died while it tried a backend, with its mount; and one that is at it.
    dead, alive = (
        stores.root.trash / f".probe-{owner}-x" for owner in ("0" * 16, stores.root.owners.me.id)
    )
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    bind = Mount(type="bind", source=str(tmp_path / "outside"), options=["rbind"])
    for folder in (dead, alive):
        (folder / "0-x" / "merged").mkdir(parents=True)
        activate([bind], folder / "0-x" / "merged")
    try:
        stores.collect()
        assert list(stores.root.trash.iterdir()) == [alive]
        assert (alive / "0-x" / "merged" / "precious").exists()
        assert (tmp_path / "outside" / "precious").exists()
    finally:
        deactivate_below(stores.root.trash)
