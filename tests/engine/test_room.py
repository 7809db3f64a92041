"""Unpacking ends before the disk is full: what is left is looked at often enough, and not too often."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.diff.apply import apply_layer
from engine.diff.budget import Budget
from engine.errors import ResourceExhausted
from engine.fs.room import Room, writers
from engine.mount import Mount, mounted
from engine.oci.digest import digest_of
from engine.root import Root
from engine.snapshots import Commit
from engine.stores import Stores
from engine.testing.archives import archive, docker_archive, member, sparse_member
from engine.unpack.workshop import Workshop
from tests.conftest import AMD64
from tests.engine.image_files import import_image

MIB = 1 << 20


@contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[Stores]:
    folder.mkdir()
    mount = Mount(type="tmpfs", source="tmpfs", options=list(options))
    with mounted([mount], folder), Root(folder / "root") as root:
        yield Stores(root, "default", AMD64)


def unpack(stores: Stores, layer: bytes, backend: str = "overlay") -> None:
    snapshotter = stores.snapshotter(backend)
    snapshotter.prepare("key")
    apply_layer([layer], snapshotter.sink("key"), diff_id=digest_of(layer))


class Disk:
    """What statvfs says, and how often it was asked."""

    f_frsize = 4096
    f_blocks = 1 << 30
    f_files = 0
    f_favail = 0

    def __init__(self, free: int, inodes: int = 0) -> None:
        self.f_bavail = free // 4096
        self.f_files = self.f_favail = inodes
        self.asked = 0

    def __call__(self, _path: object) -> "Disk":
        self.asked += 1
        return self


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(1 << 40)
    monkeypatch.setattr(os, "statvfs", made)
    return made


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
@pytest.mark.parametrize("sizes", [[4096] * 20_000, [100 * MIB]], ids=["many", "large"])
def test_unpacking_ends_before_the_disk_is_full(tmp_path: Path, sizes: list[int]) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=64m") as stores:
        layer = archive(*(member(f"{n}", data=bytes(size)) for n, size in enumerate(sizes)))
        with pytest.raises(ResourceExhausted, match=r"no space left on the device but [34] MiB"):
            unpack(stores, layer)
        left = os.statvfs(disk)
        assert left.f_bavail * left.f_frsize > 2 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return docker_archive(tmp_path / "image.tar", [bytes(40 * MIB)], ["example.org/a:1"])


@pytest.mark.root
def test_storing_ends_before_the_disk_is_full(tmp_path: Path, image: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=32m") as stores:
        with pytest.raises(ResourceExhausted, match=r"no space left on the device but \d+ MiB"):
            import_image(stores, image)
        left = os.statvfs(disk)
        assert left.f_bavail * left.f_frsize > 1 * MIB


@pytest.mark.root
def test_what_deletions_left_in_the_store_is_used_on_a_full_disk(tmp_path: Path, image: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=64m") as stores:
        import_image(stores, image)
        stores.images.remove("example.org/a:1")
        with stores.root.blobs.read():  # who reads keeps it from being given back to the disk
            assert "still reads" in str(stores.collect().errors)
        left = os.statvfs(disk)
        # Fewer than an import asks for, and an extent: a page of a tree may lie in the midst of a run.
        (disk / "filling").write_bytes(bytes(left.f_bavail * left.f_frsize - 2 * MIB))
        assert import_image(stores, image)


@pytest.mark.root
def test_copying_a_parent_ends_before_the_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=64m") as stores:
        snapshotter = stores.snapshotter("copy")
        (mount,) = snapshotter.prepare("key")
        Path(mount.source, "large").write_bytes(bytes(40 * MIB))
        snapshotter.commit(Commit(name="parent", key="key"))
        with pytest.raises(ResourceExhausted, match=r"no space left on the device but \d+ MiB"):
            snapshotter.prepare("child", "parent")
        left = os.statvfs(disk)
        assert left.f_bavail * left.f_frsize > 15 * MIB  # and nothing stays of it


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_a_sparse_file_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=64m") as stores:
        before = os.statvfs(disk).f_bavail
        # 400 KB of an archive, a block for each byte.
        layer = archive(sparse_member("1.0", b"f", 1 << 30, [(n * 4096, b"x") for n in range(20_000)]))
        with pytest.raises(ResourceExhausted, match="no space left on the device but"):
            unpack(stores, layer)
        assert before - os.statvfs(disk).f_bavail < 100


@pytest.mark.root
def test_a_copy_of_what_holds_nothing_is_looked_at_too(disk: Disk, stores: Stores) -> None:
    snapshotter = stores.snapshotter("copy")
    (mount,) = snapshotter.prepare("key")
    for number in range(600):
        os.mknod(Path(mount.source, str(number)))
    snapshotter.commit(Commit(name="parent", key="key"))
    disk.asked = 0
    snapshotter.prepare("child", "parent")
    assert disk.asked >= 3


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_unpacking_ends_before_the_inodes_do(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "nr_inodes=40000") as stores:
        layer = archive(*(member(f"{n}") for n in range(42_000)))
        with pytest.raises(ResourceExhausted, match="no inodes left on the device but"):
            unpack(stores, layer)
        assert os.statvfs(disk).f_favail


@pytest.mark.parametrize("processors", [1, 64])
def test_what_stays_free_is_more_than_all_workers_write_between_two_looks(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    # Of a MiB of headers each makes a file of a block and an inode, and as many folders above them.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(processors)))
    between = MIB // 512 * writers()
    disk.f_bavail = between
    with pytest.raises(ResourceExhausted, match="no space left"):
        Room(Path()).take(1)
    disk.f_bavail, disk.f_files, disk.f_favail = 1 << 30, 1 << 40, between
    with pytest.raises(ResourceExhausted, match="no inodes left"):
        Room(Path()).take(1)
    disk.f_favail *= 3
    Room(Path()).take(1)


def test_many_processors_do_not_make_a_small_layer_too_large(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    disk.f_bavail = 100 * MIB // disk.f_frsize
    Room(Path()).take(1024)
    assert Workshop(Path()).pool.slots.places == writers() < 64


def test_a_look_is_rare_and_comes_first(disk: Disk) -> None:
    room = Room(Path())
    for _ in range(20 * MIB // 512):
        room.take(512)
    assert 19 <= disk.asked <= 21


def test_what_is_larger_than_what_is_left_is_not_begun(disk: Disk) -> None:
    room = Room(Path())
    with pytest.raises(ResourceExhausted):
        room.take(1 << 40)
    room.take(1 << 39)


def test_what_is_only_set_aside_for_data_that_is_not_written_yet_is_free(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def syncfs(_folder: int) -> None:
        disk.f_bavail = 1 << 30

    monkeypatch.setattr("engine.fs.durable.syncfs", syncfs)
    disk.f_bavail = 100
    Room(tmp_path).take(1)
    assert disk.asked == 2


def test_folders_that_are_only_implied_count(disk: Disk, tmp_path: Path) -> None:
    # 100 KB of an archive can make 25,000 folders of a block each.
    budget = Budget(Room(tmp_path).take)
    for _ in range(25_000):
        budget.folder()
    assert disk.asked > 90
