"""`lamina du`: of the disk it says what the disk says, and of images what removing them frees."""

import os
import subprocess
from pathlib import Path

import pytest
import trio

from engine import accounting
from engine.accounting import ImageUsage, Share
from engine.app import open_engine
from engine.cli.du import drawn
from engine.kv import keys
from engine.provision.provisioner import Provisioner
from engine.root import Root
from engine.testing.archives import archive, layout, member
from tests.command import lamina, lamina_json
from tests.filesystems import formatted
from tests.inline import workers_inline

pytestmark = pytest.mark.root

_BASE = archive(
    member("etc/", "5", mode=0o755), *(member(f"etc/{n}", data=b"%d" % n * 9000) for n in range(20))
)


def _image(folder: Path, name: str, size: int) -> Path:
    own = archive(*(member(f"{name}/{n}", data=os.urandom(size)) for n in range(5)))
    return layout(folder / name, [_BASE, own], tag="1")


def _compare(root: Path) -> None:
    """Hold `lamina du` against `du`."""
    os.sync()
    said = subprocess.run(["du", "-sxB1", root], capture_output=True, text=True, check=True).stdout
    usage = lamina_json(root, "du")
    # A committed layer is known by its size in blocks of 4096 bytes, whatever the file system's are.
    inodes = sum(1 for _ in (root / "snapshots").rglob("*"))
    assert abs(usage["total"] - int(said.split()[0])) <= 4096 * inodes, usage
    parts = (usage[part] for part in ("exclusive", "shared", "garbage", "elsewhere", "overhead"))
    containers = sum(one["written"] + one["files"] for one in usage["containers"])
    assert usage["total"] == sum(size for part in parts for size in part.values()) + containers


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_p10_the_total_is_what_du_says(tmp_path: Path, kind: str):
    with formatted(kind, tmp_path / "image", _folder(tmp_path / "disk")) as disk:
        root, target = disk / "root", _folder(disk / "mnt")
        for name, size in (("one", 30_000), ("two", 1_500_000)):
            lamina(root, "import", "--snapshotter", "overlay", _image(tmp_path, name, size))
        _compare(root)
        lamina(root, "unpack", "--snapshotter", "copy", "one:1")
        lamina(root, "mount", "--rw", "--snapshotter", "overlay", "one:1", target, "--name", "web")
        try:
            (target / "written").write_bytes(os.urandom(700_000))
            (target / "etc/1").unlink()
            os.sync()
            kept = lamina_json(root, "du")["shared"]["snapshots"]
            assert kept >= 700_000
            _compare(root)
        finally:
            lamina(root, "umount", target)
        lamina(root, "image", "rm", "two:1")
        _compare(root)
        lamina(root, "gc")
        assert sum(lamina_json(root, "du")["garbage"].values()) == 0
        _compare(root)
        lamina(root, "snapshots", "rm", "web")
        lamina(root, "image", "rm", "one:1")
        lamina(root, "gc")
        _compare(root)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.usefixtures("umask_0")
def test_containers_are_counted_with_what_they_wrote_and_logged(tmp_path: Path, kind: str):
    async def work(root: Path) -> None:
        async with open_engine(root) as engine:
            provisioner = Provisioner(engine)
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await engine.import_image(
                    _image(tmp_path, "one", 30_000), name="one:1", snapshotter="overlay"
                )
                before = lamina_json(root, "du")
                for name, size in (("small", 10_000), ("large", 700_000)):
                    made = await provisioner.provision(name, "one:1", snapshotter="overlay")
                    (made.rootfs / "data").write_bytes(os.urandom(size))
                    (made.folder / "log").write_bytes(os.urandom(2 * size))
                os.sync()
                _compare(root)
                usage = lamina_json(root, "du")
                assert usage["shared"] == before["exclusive"]  # the containers hold their image, too
                large, small = usage["containers"]
                assert (large["name"], small["name"]) == ("large", "small")
                assert large["image"] == "docker.io/library/one:1"
                assert 700_000 <= large["written"] < 800_000
                assert 1_400_000 <= large["files"] < 1_500_000
                shown = lamina(root, "du").stdout
                assert "CONTAINER  " in shown
                assert "\ncontainers  " in shown
                for name in ("small", "large"):
                    await provisioner.destroy(name)
                after = lamina_json(root, "du")
                assert (after["containers"], after["exclusive"]) == ([], before["exclusive"])
                _compare(root)

    with formatted(kind, tmp_path / "image", _folder(tmp_path / "disk")) as disk:
        trio.run(work, disk / "root")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_images_are_ranked_by_what_removing_them_frees(tmp_path: Path):
    root = tmp_path / "root"
    for name, size in (("small", 1_000), ("large", 50_000)):
        lamina(root, "import", "--snapshotter", "overlay", _image(tmp_path, name, size))
    before = lamina_json(root, "du")
    large, small = before["images"]
    assert (large["name"], small["name"]) == ("docker.io/library/large:1", "docker.io/library/small:1")
    assert large["shared"] == small["shared"] == before["shared"]
    assert before["garbage"] == {"content": 0, "snapshots": 0}
    assert lamina(root, "du", "-q").stdout.split() == ["large:1", "small:1"]
    lamina(root, "image", "rm", "large:1")
    assert lamina_json(root, "du")["garbage"] == large["exclusive"]
    gone = lamina_json(root, "gc")
    assert {"content": gone["blob_bytes"], "snapshots": gone["snapshot_bytes"]} == large["exclusive"]
    (alone,) = lamina_json(root, "du")["images"]
    assert alone["shared"] == {"content": 0, "snapshots": 0}
    lamina(root, "tag", "small:1", "small:2")
    for row in lamina_json(root, "du")["images"]:
        assert row["exclusive"] == {"content": 0, "snapshots": 0}  # another name has it too
        assert row["shared"] == alone["exclusive"]


def test_other_namespaces_are_on_the_same_disk(stocked: Path, other_image: Path):
    lamina(stocked, "--namespace", "team", "import", "--snapshotter", "overlay", other_image)
    mine, theirs = (lamina_json(stocked, "--namespace", name, "du") for name in ("default", "team"))
    assert mine["total"] == theirs["total"]
    assert mine["elsewhere"] == theirs["exclusive"]
    assert theirs["elsewhere"] == mine["exclusive"]
    _compare(stocked)


def test_an_image_that_cannot_be_read_is_a_row_and_what_is_lost_takes_up_nothing(stocked: Path):
    digest = lamina_json(stocked, "content", "ls")[0]["digest"]
    with Root(stocked) as root, root.meta.write() as txn:
        for table, key in (("images", "bad:1"), ("blobs", digest)):
            txn.raw.put(keys.encode(("default", key)), b"\xc1", db=txn.databases[table])
    usage = lamina_json(stocked, "du")
    assert [row["name"] for row in usage["images"]] == ["docker.io/library/app:1", "bad:1"]
    assert "cannot be read" in usage["images"][1]["error"]
    assert "bad:1" in lamina(stocked, "du").stdout


@pytest.mark.parametrize("table", ["mentions", "holdings"])
def test_what_is_noted_and_cannot_be_read_loses_no_report(stocked: Path, table: str):
    before = lamina_json(stocked, "du")
    with Root(stocked) as root, root.meta.write() as txn:
        db = txn.databases[table]
        with txn.raw.cursor(db=db) as cursor:
            damaged = [bytes(key) for key, _ in cursor]
        for key in damaged:
            txn.raw.put(key, b"\xc1", db=db)
    usage = lamina_json(stocked, "du")
    assert [row["name"] for row in usage["images"]] == ["docker.io/library/app:1"]
    assert usage["total"] == pytest.approx(before["total"], abs=1 << 16)


def test_a_folder_that_goes_meanwhile_takes_up_nothing(stocked: Path, monkeypatch: pytest.MonkeyPatch):
    """A collection beside it removes the folder between the listing and the look."""
    gone = stocked / "snapshots/overlay/999"
    gone.mkdir(parents=True)
    own = accounting.own

    def late(path: Path) -> int:
        size = own(path)
        if path == gone:
            gone.rmdir()
        return size

    monkeypatch.setattr(accounting, "own", late)
    assert lamina_json(stocked, "du")["images"]
    assert not gone.exists()


def test_du_of_an_empty_store(tmp_path: Path, image: Path):
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", image)
    lamina(root, "image", "rm", "app:1")
    lamina(root, "gc")
    done = lamina(root, "du")
    assert done.stderr == "no images\n"
    assert [line.split()[0] for line in done.stdout.split("\n\n")[-1].splitlines()[1:]][-1] == "all"
    _compare(root)


@pytest.mark.parametrize(
    ("exclusive", "shared", "bar"),
    [(100, 100, "█" * 12 + "░" * 12), (200, 0, "█" * 24), (0, 50, "░" * 6), (0, 0, "")],
)
def test_bars_show_what_would_go_and_what_would_stay(exclusive: int, shared: int, bar: str):
    row = ImageUsage("name", "digest", Share(exclusive), Share(snapshots=shared))
    assert drawn(row, 200) == bar
    assert not drawn(ImageUsage("name", "digest", Share(), Share()), 0)
