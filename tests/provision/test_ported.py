"""The tests of the Mesos provisioner and its backends, on every backend that works here (BK-18).

A layer has a folder of its own in the store, whatever the name of its blob: names of 64 characters, and
many of them, are in the mount's options all the same.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import DataLoss, NotFound
from engine.kv.schema import BLOBS
from engine.mounts.table import is_mounted
from engine.testing.archives import archive, member
from tests.provision.scene import BASE, Bench, Host, assert_nothing_left, bench, mounted_below, reboot

pytestmark = pytest.mark.root


@pytest.fixture(name="bench", params=["overlay", "copy", pytest.param("aufs", marks=pytest.mark.aufs)])
def _bench(request: pytest.FixtureRequest, tmp_path: Path, umask_0: None) -> Iterator[Bench]:
    with bench(tmp_path / "root", request.param) as made:
        yield made


def _seen(bench: Bench, *layers: bytes, look: Callable[[Path], None]) -> None:
    """Provision an image, look at its root, and have all of it go."""
    bench.serve("image", *layers)

    async def work(host: Host) -> None:
        made = await host.provision("c", "image")
        look(made.rootfs)
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("image",))


def test_bk_18_mc_15_root_two_layers(bench: Bench) -> None:
    """ROOT_OVERLAYFS_OverlayFSBackend, ROOT_AUFS_AufsBackend, ROOT_CopyBackend; MC-15, BK-50."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        assert (made.rootfs / "etc/name").read_text() == "base\n"
        assert (made.rootfs / "own").read_text() == "one\n"
        (made.rootfs / "etc/name").write_text("written\n")
        (made.rootfs / "dir").mkdir()
        assert sum(path.joinpath("dir").is_dir() for path in made.grows) == 1
        other = await host.provision("d")
        assert (other.rootfs / "etc/name").read_text() == "base\n"
        assert not (other.rootfs / "dir").exists()
        for name in "cd":
            assert await host.provisioner.destroy(name)
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_18_root_many_layers(bench: Bench) -> None:
    """ROOT_OVERLAYFS_OverlayFSBackendWithMultipleLayers: options of more than a page.

    aufs stacks 126, and a copy of 400 trees would show nothing that 64 do not.
    """
    count = 400 if bench.backend == "overlay" else 64

    def look(root: Path) -> None:
        assert len(os.listdir(root)) == count
        assert (root / f"{count - 1:064}").read_text() == str(count - 1)
        (root / "new").touch()

    layers = [archive(member(f"{number:064}", data=str(number).encode())) for number in range(count)]
    _seen(bench, *layers, look=look)


def test_bk_18_root_64_layers(bench: Bench) -> None:
    layers = [archive(member(f"{number:064}")) for number in range(64)]
    _seen(bench, *layers, look=lambda root: (root / f"{63:064}").write_text("x"))


def test_bk_18_root_one_layer_read_only(bench: Bench) -> None:
    """ROOT_BindBackend (BK-30): read-only though the modes say that anyone may write."""
    bench.serve("single", archive(member("dir/", "5", mode=0o777), member("dir/file", mode=0o666)))

    async def work(host: Host) -> None:
        made = await host.provision("c", "single", readonly=True)
        assert stat.S_IMODE((made.rootfs / "dir").stat().st_mode) == 0o777
        for name in ("dir/new", "dir/file"):
            with pytest.raises(OSError, match="Read-only"):
                (made.rootfs / name).write_text("x")
        assert await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("single",))


def test_bk_15_18_mc_10_root_recover(bench: Bench) -> None:
    """ROOT_RecoverLegacy, Recover (MC-10, BK-15): the known stay as they are, the others go."""

    async def work(host: Host) -> None:
        made = await host.provision("kept")
        await host.provision("gone")
        (made.rootfs / "file").touch()
        recovered = await host.provisioner.recover(["kept", "not there"])
        assert (recovered.kept, recovered.destroyed) == (["kept"], ["gone"])
        assert (made.rootfs / "file").exists()
        reboot(host.stores)
        assert (await host.provisioner.recover(["kept"])).kept == ["kept"]
        assert (made.rootfs / "file").exists()
        assert await host.provisioner.destroy("kept")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_16_18_root_recover_nested_on_reboot(bench: Bench) -> None:
    """ROOT_RecoverNestedOnReboot (BK-16): nobody is known, and parents may come first."""

    async def work(host: Host) -> None:
        await host.provision("b-parent")
        await host.provision("a-child", parent="b-parent")
        await host.provision("c-child", parent="b-parent")
        reboot(host.stores)
        recovered = await host.provisioner.recover(())
        assert sorted(recovered.destroyed) == ["a-child", "b-parent", "c-child"]
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_18_root_nested_container(bench: Bench) -> None:
    """ROOT_NestedContainer: a child has a root of its own, and goes alone or with its parent."""

    async def work(host: Host) -> None:
        parent = await host.provision("parent")
        child = await host.provision("child", "two", parent="parent")
        assert (child.rootfs / "own").read_text() == "two\n"
        assert await host.provisioner.destroy("child")
        assert is_mounted(parent.rootfs)
        await host.provision("child", "two", parent="parent")
        assert await host.provisioner.destroy("parent")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=("one", "two"))


def test_bk_18_root_whiteouts(bench: Bench) -> None:
    """ROOT_INTERNET_CURL_Whiteout (BK-25): hidden below, kept where the same layer has the name."""
    lower = archive(
        member("gone"),
        member("dir/", "5"),
        member("dir/lower"),
        member("both", data=b"lower"),
        member("tree/", "5"),
        member("tree/file"),
    )
    upper = archive(
        member(".wh.gone"),
        member("dir/.wh..wh..opq"),
        member("dir/upper"),
        member(".wh.both"),
        member("both", data=b"upper"),
        member(".wh.tree"),
    )

    def look(root: Path) -> None:
        assert sorted(os.listdir(root)) == ["both", "dir"]
        assert os.listdir(root / "dir") == ["upper"]
        assert (root / "both").read_text() == "upper"

    _seen(bench, lower, upper, look=look)


def test_bk_18_root_overwrite(bench: Bench, tmp_path: Path) -> None:
    """ROOT_INTERNET_CURL_Overwrite (BK-23): in all directions; a link to the host is not followed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("of the host\n")
    kinds = {
        "dir": lambda name: [member(f"{name}/", "5"), member(f"{name}/below")],
        "file": lambda name: [member(name, data=b"file")],
        "link": lambda name: [member(name, "2", link=str(victim))],
    }
    pairs = [(old, new) for old in kinds for new in kinds if old != new]
    lower = [part for old, new in pairs for part in kinds[old](f"{old}-{new}")]
    upper = [part for old, new in pairs for part in kinds[new](f"{old}-{new}")]

    def look(root: Path) -> None:
        for old, new in pairs:
            path = root / f"{old}-{new}"
            found = "link" if path.is_symlink() else "dir" if path.is_dir() else "file"
            assert found == new, path.name
            if new == "dir":
                assert os.listdir(path) == ["below"]
        assert os.listdir(victim) == ["file"]

    _seen(bench, archive(*lower), archive(*upper), look=look)
    assert (victim / "file").read_text() == "of the host\n"


def test_bk_18_root_open_file_while_destroying(bench: Bench) -> None:
    """ROOT_DestroyUnreferenced, MESOS-9196 (BK-44)."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        with (made.rootfs / "own").open() as opened:
            assert await host.provisioner.destroy("c")
            assert opened.read() == "one\n"
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_18_missing_config(bench: Bench) -> None:
    """A config that is gone: there is no such image, and nothing is left of the try."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        config = made.container.config
        with host.stores.root.meta.write() as txn:
            record = BLOBS.get(txn, "default", config)
            BLOBS.delete(txn, "default", config)
        with pytest.raises(NotFound):
            await host.provision("d")
        assert len(mounted_below(bench.root)) == 1
        assert record is not None
        with host.stores.root.meta.write() as txn:
            BLOBS.put(txn, record, "default", config)
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work)


def test_bk_18_pull_by_digest(bench: Bench) -> None:
    """SimpleRegistryPullerByDigest (MS-20)."""
    digest = bench.serve("digested", BASE)

    async def work(host: Host) -> None:
        name = f"{bench.registry.name}/a@{digest}"
        about = {"snapshotter": bench.backend}
        made = await host.provisioner.provision("c", name, client=host.client, **about)  # type: ignore[arg-type]
        assert (made.container.image, made.container.target) == (name, digest)
        assert (made.rootfs / "etc/name").read_text() == "base\n"
        await host.provisioner.destroy("c")
        assert_nothing_left(host.stores)

    bench.run(work, pulled=())


def test_bk_15_what_a_container_lost_is_told(bench: Bench) -> None:
    """A record without what it stands for fails by itself, and can be removed."""

    async def work(host: Host) -> None:
        made = await host.provision("c")
        await host.provision("d")
        reboot(host.stores)
        key = f"container-{made.container.unique}"
        backend = host.stores.snapshotter(bench.backend)
        number = backend.remove(key)
        backend.cleanup(only={number})
        recovered = await host.provisioner.recover(["c", "d"])
        assert recovered.kept == ["d"]
        assert "lost its snapshot" in recovered.failed["c"]
        with pytest.raises(DataLoss):
            await host.provision("c")
        for name in "cd":
            assert await host.provisioner.destroy(name)
        assert_nothing_left(host.stores)

    bench.run(work)
