"""What a container may write, by real file systems: a full one is full alone."""

import errno
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from engine.app import open_engine
from engine.errors import FailedPrecondition, InvalidArgument, NotSupported, ResourceExhausted
from engine.fs import kernel
from engine.mount import Mount, mounted
from engine.provision import quota
from engine.provision.provisioner import Provisioner
from engine.provision.quota import PROJECTS, change_limit, check_quotas, limit, quota_of
from engine.stores import host_platform
from engine.testing.archives import archive, layout, member
from tests.conftest import peer
from tests.filesystems import formatted, in_memory
from tests.inline import workers_inline

pytestmark = pytest.mark.root

_FULL = {errno.ENOSPC, errno.EDQUOT}
_MIB = 1 << 20
_MAKE = {"ext4": ("-Oproject,quota", "-Equotatype=prjquota"), "xfs": ()}


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with project quotas."""
    make = _MAKE[request.param]
    with formatted(
        request.param, tmp_path / "image", _folder(tmp_path / "disk"), "prjquota", make=make
    ) as made:
        yield made


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


class Layered:
    """An overlay as a container has it: a file below, folders that grow, and where it is mounted."""

    def __init__(self, disk: Path, name: str) -> None:
        self.place = disk / name
        lower = _folder(self.place / "lower")
        (lower / "large").write_bytes(os.urandom(3 * _MIB))
        (_folder(lower / "etc") / "name").write_text("below")
        self.grows = [_folder(self.place / "fs"), _folder(self.place / "work")]
        self.root = _folder(self.place / "rootfs")

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        upper, work = self.grows
        options = [f"lowerdir={self.place}/lower", f"upperdir={upper}", f"workdir={work}", "xino=off"]
        with mounted([Mount(type="overlay", source="overlay", options=options)], self.root):
            yield self.root


def _fill(file: Path, most: int) -> tuple[int, int]:
    """Write up to so much; return how much it was, and what ended it."""
    written = 0
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while written < most:
            written += os.write(descriptor, bytes(64 * 1024))
        os.fsync(descriptor)
    except OSError as error:
        return written, error.errno or 0
    finally:
        os.close(descriptor)
    return written, 0


# -- where there are quotas ---------------------------------------------------------------------


@pytest.mark.quota
def test_mc_15_bk_43_writes_stop_at_the_limit_and_nobody_else_suffers(disk: Path):
    full, free, other = (Layered(disk, name) for name in ("full", "free", "other"))
    limit(full.grows, 4 * _MIB)
    limit(other.grows, 8 * _MIB)
    with full.mounted() as root, free.mounted() as neighbour, other.mounted() as limited:
        written, why = _fill(root / "data", 20 * _MIB)
        assert why in _FULL
        assert 3 * _MIB < written <= 4 * _MIB
        assert _fill(neighbour / "data", 20 * _MIB) == (20 * _MIB, 0)
        assert _fill(limited / "data", 6 * _MIB) == (6 * _MIB, 0)
        # What removing gives back can be written again.
        (root / "data").unlink()
        assert _fill(root / "again", 3 * _MIB) == (3 * _MIB, 0)
    found = quota_of(full.grows[0])
    assert found
    assert 3 * _MIB <= found.size <= found.most_size == 4 * _MIB
    assert quota_of(full.grows[1]) == found
    assert quota_of(free.grows[0]) is None


@pytest.mark.quota
def test_bk_43_renames_work_and_what_is_copied_up_counts(disk: Path):
    made = Layered(disk, "one")
    limit(made.grows, 5 * _MIB)
    with made.mounted() as root:
        _folder(root / "a/b")
        (root / "a/b/file").write_text("x")
        os.symlink("file", root / "a/b/link")
        os.mkfifo(root / "a/b/fifo")
        _folder(root / "c")
        for name in ("file", "link", "fifo"):
            os.rename(root / "a/b" / name, root / "c" / name)
        os.rename(root / "a", root / "c/a")
        os.rename(root / "etc/name", root / "c/name")  # from below: copied up, and hidden there
        os.link(root / "c/file", root / "c/a/linked")
        assert not (root / "etc/name").exists()
        before = quota_of(made.grows[0])
        assert before
        with (root / "large").open("r+b") as file:  # 3 MiB that are the container's then
            file.write(b"x")
        after = quota_of(made.grows[0])
        assert after
        assert after.size - before.size >= 3 * _MIB
        assert _fill(root / "more", 5 * _MIB)[1] in _FULL
        os.unlink(root / "more")  # first what is the container's own: hiding takes room, too
        os.unlink(root / "large")
        os.mkdir(root / "etc/name")  # over what hides the one below


@pytest.mark.quota
def test_empty_files_come_to_an_end_too(disk: Path):
    made = Layered(disk, "one")
    limit(made.grows, 2 * _MIB)
    allowed = quota_of(made.grows[0])
    assert allowed
    before = os.statvfs(disk).f_ffree
    with made.mounted() as root:

        def fill() -> None:
            for number in range(allowed.most_inodes + 1):
                os.mknod(root / str(number))

        with pytest.raises(OSError, match=r"space|quota") as raised:
            fill()
    assert raised.value.errno in _FULL
    assert os.statvfs(disk).f_ffree > before // 2


@pytest.mark.quota
def test_a_whole_tree_counts_with_what_it_had(disk: Path):
    tree = _folder(disk / "copy/1/fs")
    (_folder(tree / "a/b") / "file").write_bytes(os.urandom(2 * _MIB))
    os.link(tree / "a/b/file", tree / "linked")
    os.symlink("/nowhere", tree / "link")
    os.symlink(disk, tree / "out")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    outside = disk / "outside"
    outside.write_bytes(bytes(_MIB))
    with pytest.raises(ResourceExhausted, match=f"a limit of {_MIB} bytes .* give more"):
        limit([tree], _MIB)
    shutil.rmtree(tree)
    (_folder(tree / "a") / "file").write_bytes(os.urandom(2 * _MIB))
    limit([tree], 4 * _MIB)
    found = quota_of(tree)
    assert found
    assert (found.size >= 2 * _MIB, found.inodes) == (True, 3)
    # Whoever may do all is not held back by ext4; of containers nobody may.
    words = ["--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "--ambient-caps=-sys_resource"]
    done = subprocess.run(
        [peer("setpriv"), *words, "dd", "if=/dev/zero", f"of={tree}/a/more", "bs=64k", "count=100"],
        capture_output=True,
        check=False,
        text=True,
    )
    assert "No space left" in done.stderr or "quota exceeded" in done.stderr, done.stderr
    assert (tree / "a/more").stat().st_size <= 2 * _MIB


@pytest.mark.quota
def test_a_limit_can_be_changed_but_not_come_late(disk: Path):
    made, free = Layered(disk, "one"), Layered(disk, "two")
    limit(made.grows, _MIB)
    with made.mounted() as root:
        assert _fill(root / "data", 8 * _MIB)[1] in _FULL
        change_limit(made.grows[0], 6 * _MIB)
        assert _fill(root / "more", 4 * _MIB) == (4 * _MIB, 0)
        with pytest.raises(ResourceExhausted, match="there already"):
            change_limit(made.grows[0], 2 * _MIB)
        change_limit(made.grows[0], 0)
        assert _fill(root / "all", 10 * _MIB) == (10 * _MIB, 0)
        change_limit(made.grows[0], 20 * _MIB)
        assert _fill(root / "end", 10 * _MIB)[1] in _FULL
    with pytest.raises(FailedPrecondition, match="made without a limit"):
        change_limit(free.grows[0], _MIB)


@pytest.mark.quota
def test_no_project_is_shared_and_one_that_ended_is_taken_again(
    disk: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = [PROJECTS[7]] * 3 + [PROJECTS[9], PROJECTS[7]]
    monkeypatch.setattr(random, "choice", lambda _: numbers.pop(0))
    one, two, three = (Layered(disk, name) for name in ("one", "two", "three"))
    limit(one.grows, _MIB)
    limit(two.grows, 8 * _MIB)  # the same number twice, then another
    assert numbers == [PROJECTS[7]]
    with one.mounted() as root:
        assert _fill(root / "data", 8 * _MIB)[1] in _FULL
    with two.mounted() as root:
        assert _fill(root / "data", 6 * _MIB) == (6 * _MIB, 0)
    shutil.rmtree(one.place)
    (three.grows[0] / "old").write_bytes(bytes(4 * _MIB))  # more than was allowed of that number
    limit(three.grows, 8 * _MIB)
    assert not numbers
    found = quota_of(three.grows[0])
    assert found
    assert found.most_size == 8 * _MIB


@pytest.mark.quota
def test_of_two_who_take_one_number_at_once_the_later_takes_another(
    disk: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = [PROJECTS[7], PROJECTS[8]]
    monkeypatch.setattr(random, "choice", lambda _: numbers.pop(0))
    mine, theirs = Layered(disk, "mine"), Layered(disk, "theirs")
    put = kernel.put_in_project

    def late(folder: int, project: int) -> None:
        if project == PROJECTS[7]:  # another process, between the look and this
            other = os.open(theirs.grows[0], os.O_RDONLY)
            put(other, project)
            kernel.limit_project(other, project, 5 * _MIB, 100)
            os.close(other)
        put(folder, project)

    monkeypatch.setattr(quota, "put_in_project", late)
    limit(mine.grows, _MIB)
    found, other = quota_of(mine.grows[0]), quota_of(theirs.grows[0])
    assert found
    assert other
    assert (found.inodes, found.most_size) == (2, _MIB)
    assert (other.inodes, other.most_size, other.most_inodes) == (1, 5 * _MIB, 100)


@pytest.mark.quota
def test_when_all_are_taken_it_is_said(disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random, "choice", lambda _: PROJECTS[0])
    one, two = Layered(disk, "one"), Layered(disk, "two")
    limit(one.grows, _MIB)
    with pytest.raises(ResourceExhausted, match=r"no project .* is free"):
        limit(two.grows, _MIB)
    assert quota_of(two.grows[0]) is None


@pytest.mark.quota
def test_what_counts_for_another_project_is_left_there(disk: Path):
    subprocess.run([peer("chattr"), "-p", "42", "+P", disk], check=True)
    made = Layered(disk, "one")
    for folder in (disk, made.place):
        with pytest.raises(NotSupported, match=r"counts for project 42 .*chattr -p 0"):
            check_quotas(folder)
    with pytest.raises(NotSupported, match="project 42"):
        limit(made.grows, _MIB)


@pytest.mark.quota
def test_who_has_his_ids_mapped_cannot_leave(disk: Path):
    made = Layered(disk, "one")
    limit(made.grows, _MIB)
    (made.place / "lower/large").unlink()
    with made.mounted() as root:
        _folder(root / "mine").chmod(0o777)
        apart = ["unshare", "--user", "--map-root-user"]
        for words in (["-p", "0"], ["-P"]):
            done = subprocess.run(
                [*apart, peer("chattr"), *words, root / "mine"], capture_output=True, check=False
            )
            assert done.returncode
        assert _fill(root / "mine/data", 8 * _MIB)[1] in _FULL


@pytest.mark.quota
def test_a_kernel_that_wants_the_device_gets_it(disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "_QUOTACTL_FD", 100_000)  # as if there were no such call
    device, made = disk.stat().st_dev, Layered(disk, "one")
    node = Path(f"/dev/block/{os.major(device)}:{os.minor(device)}")
    is_there = node.exists()  # udev makes it
    if not is_there:
        node.parent.mkdir(exist_ok=True)
        os.mknod(node, 0o600 | stat.S_IFBLK, device)
    try:
        limit(made.grows, _MIB)
        found = quota_of(made.grows[0])
    finally:
        if not is_there:
            node.unlink()
    assert found
    assert found.most_size == _MIB


@pytest.mark.quota
@pytest.mark.parametrize(("kind", "option"), [("ext4", "noquota"), ("xfs", "pqnoenforce")])
def test_counting_alone_is_no_limit(tmp_path: Path, kind: str, option: str):
    where = tmp_path / "image", _folder(tmp_path / "disk")
    with (
        formatted(kind, *where, option, make=_MAKE[kind]) as made,
        pytest.raises(NotSupported, match="prjquota"),
    ):
        check_quotas(made)


def _image(folder: Path, data: bytes) -> Path:
    host = host_platform()
    platform = {"os": host.os, "architecture": host.architecture}
    base = archive(member("etc/", "5", mode=0o755), member("etc/below", data=data))
    return layout(folder, [base], platform=platform)


def _provisioning(
    root: Path, layout_of: Path, backend: str, work: Callable[[Provisioner], Awaitable[None]]
) -> None:
    async def opened() -> None:
        async with open_engine(root) as engine:
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await engine.import_image(layout_of, name="image:1", snapshotter=backend)
                await work(Provisioner(engine))

    trio.run(opened)


@pytest.mark.quota
@pytest.mark.parametrize("backend", ["overlay", "copy"])
@pytest.mark.usefixtures("umask_0")
def test_mc_15_a_container_has_its_quota_until_it_goes(tmp_path: Path, disk: Path, backend: str):
    async def work(provisioner: Provisioner) -> None:
        about = {"snapshotter": backend}
        free = await provisioner.provision("free", "image:1", **about)
        made = await provisioner.provision("web", "image:1", quota=4 * _MIB, **about)
        assert made.container.quota == 4 * _MIB
        found = [quota_of(folder) for folder in made.grows]
        assert all(one and one.most_size == 4 * _MIB for one in found)
        if backend == "overlay":  # who may do all is held back by overlay, and by no other
            assert _fill(made.rootfs / "data", 8 * _MIB)[1] in _FULL
            assert _fill(free.rootfs / "data", 8 * _MIB) == (8 * _MIB, 0)
        changed = await provisioner.update("web", quota=16 * _MIB)
        assert changed.quota == 16 * _MIB
        assert _fill(made.rootfs / "data", 8 * _MIB) == (8 * _MIB, 0)
        with pytest.raises(FailedPrecondition, match="made without a limit"):
            await provisioner.update("free", quota=_MIB)
        with pytest.raises(InvalidArgument, match="number of bytes"):
            await provisioner.update("web", quota=-1)
        assert (await provisioner.status("free")).quota == 0
        for name in ("web", "free"):
            assert await provisioner.destroy(name)
        assert not any(folder.exists() for folder in made.grows)

    _provisioning(disk / "root", _image(tmp_path / "layout", os.urandom(_MIB)), backend, work)


# -- where there are none -----------------------------------------------------------------------


@contextmanager
def _without(kind: str, folder: Path) -> Iterator[Path]:
    if kind == "tmpfs":
        with in_memory(folder / "disk") as made:
            yield made
    else:
        with formatted(kind, folder / "image", _folder(folder / "disk")) as made:
            yield made


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_a_file_system_without_them_is_named_with_what_to_do(tmp_path: Path, kind: str):
    with _without(kind, tmp_path) as disk:
        folders = [_folder(disk / "1/fs"), _folder(disk / "1/work")]
        for call in (
            lambda: check_quotas(disk),
            lambda: limit(folders, _MIB),
            lambda: change_limit(folders[0], _MIB),
        ):
            with pytest.raises(
                NotSupported, match=r"mount it with the option prjquota .* without a limit"
            ):
                call()
        assert quota_of(folders[0]) is None


@pytest.mark.usefixtures("umask_0")
def test_a_container_with_a_quota_is_not_begun_where_it_cannot_be_kept(tmp_path: Path):
    async def work(provisioner: Provisioner) -> None:
        with pytest.raises(NotSupported, match="prjquota"):
            await provisioner.provision("web", "image:1", quota=_MIB, snapshotter="overlay")
        assert await provisioner.walk() == []

    with in_memory(tmp_path / "disk") as disk:
        _provisioning(disk / "root", _image(tmp_path / "layout", b"x"), "overlay", work)
