"""What a snapshot takes up: what it holds itself, each inode once, its markers among it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.fs import usage
from engine.fs.attributes import folder_descriptor
from engine.fs.kernel import open_beneath
from engine.fs.usage import measure
from engine.mount import Mount, mounted
from engine.snapshots import Commit, Snapshotter, Usage
from engine.stores import Stores
from engine.testing.archives import archive, member
from tests.support import BACKENDS, apply_stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

BLOCK = 4096

LAYERS = [
    archive(
        member("d/f", data=b"x" * 5000),
        member("d/h", "1", link="d/f"),
        member("d/empty"),
        member("e/x"),
        member("gone"),
        member("replaced/a"),
        member("short", "2", link="x" * 59),
        member("long", "2", link="x" * 60),
        member("twice", "1", link="long"),
        member("p", "6"),
        member("c", "3", device=(1, 3)),
    ),
    archive(
        member(".wh.gone"),
        member(".wh.nothing"),
        member("d/.wh..wh..opq"),
        member("d/new", data=b"x"),
        member("e/.wh.x"),
        member("replaced"),
    ),
    archive(member(".wh..wh..opq"), member("replaced/", "5"), member("d/x/", "5")),
]
IN_FIRST = 6  # blocks of the first layer: three folders, a file of two, a link of one


def trees(stores: Stores, name: str) -> list[tuple[str, Path]]:
    """Return names and trees of all snapshots, in the order in which they were made."""
    records = sorted(stores.snapshotter(name)._store.walk(), key=lambda record: record.id)
    return [(r.key, stores.root.snapshots / name / str(r.id) / "fs") for r in records]


def inodes_of(tree: Path) -> int:
    with folder_descriptor(tree) as opened:
        return measure(opened)[1]


@pytest.mark.parametrize("name", BACKENDS)
def test_markers_and_links_count_as_what_they_are(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    apply_stack(backend, LAYERS)
    usages = [backend.usage(key) for key, _ in trees(stores, name)]
    assert [usage.inodes for usage in usages] == [inodes_of(tree) for _, tree in trees(stores, name)]
    assert usages[0] == Usage(IN_FIRST * BLOCK, 12)
    if name != "copy":  # which holds what it has copied too
        assert usages[1].size == 3 * BLOCK  # d, e, d/new: whiteouts take no block
        assert usages[2].size == 3 * BLOCK


@pytest.mark.parametrize("name", BACKENDS)
def test_an_active_snapshot_is_measured_without_its_parents(name: str, stores: Stores) -> None:
    backend = stores.snapshotter(name)
    parent = apply_stack(backend, LAYERS[:1])
    backend.prepare("active", parent)
    backend.view("view", parent)
    inodes = 12 if name == "copy" else 0
    assert backend.usage("active").inodes == inodes
    assert backend.usage("view") == Usage(0, 0)
    place = Path(backend.sink("active").place)
    (place / "fs" / "mine").write_bytes(b"x" * 100_000)
    (place / "beside").write_bytes(b"x")  # the tree counts, not what a backend keeps beside it
    assert backend.usage("active").inodes == inodes + 1
    assert backend.usage("active").size >= 100_000
    measured = backend.usage("active")
    backend.commit(Commit(name="done", key="active"))
    assert backend.usage("done") == measured


def test_what_is_mounted_in_a_tree_does_not_count(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "mounted").mkdir(parents=True)
    (tree / "file").write_bytes(b"x" * 5000)
    (tree / "sparse").touch()
    os.truncate(tree / "sparse", 1 << 30)
    os.link(tree / "file", tree / "a" / "again")
    with folder_descriptor(tree) as opened:
        before = measure(opened)
    assert before[1] == 4
    assert 5000 <= before[0] < 1 << 20
    with mounted([Mount(type="tmpfs", source="tmpfs", options=[])], tree / "a" / "mounted"):
        (tree / "a" / "mounted" / "much").write_bytes(b"x" * 100_000)
        with folder_descriptor(tree) as opened:
            size, inodes = measure(opened)
    assert inodes == before[1]
    assert size <= before[0]


def test_a_tree_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    with folder_descriptor(tmp_path) as top:
        here = os.dup(top)
        for _ in range(30):
            os.mkdir("d" * 200, dir_fd=here)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.symlink("/", "l", dir_fd=here)
        os.close(here)
        assert measure(top)[1] == 31
        way = b"/".join([b"d" * 200] * 30)
        os.close(open_beneath(top, way, os.O_RDONLY | os.O_DIRECTORY))
        for path in (way + b"/l/etc", way + b"/l/" + way):
            with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
                open_beneath(top, path, os.O_RDONLY | os.O_DIRECTORY)
        for path in (b"n" * 5000, way + b"/" + b"n" * 5000):
            with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
                open_beneath(top, path, os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_first_layer_counts_no_more_for_what_is_above(name: str, stores: Stores) -> None:
    backend: Snapshotter = stores.snapshotter(name)
    first = apply_stack(backend, LAYERS[:1])
    before = backend.usage(first)
    apply_stack_on(backend, first)
    assert backend.usage(first) == before


def apply_stack_on(backend: Snapshotter, parent: str) -> None:
    backend.prepare("above", parent)
    tree = Path(backend.sink("above").place) / "fs"
    (tree / "above").write_bytes(b"x" * 100_000)
    backend.commit(Commit(name="top", key="above"))


@pytest.mark.parametrize("becomes", ["nothing", "file", "link"])
def test_what_goes_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
):
    """As in the folder of a container that runs."""
    (tmp_path / "stays/below").mkdir(parents=True)
    (tmp_path / "goes").mkdir()
    open_beneath = usage.open_beneath

    def late(root: int, path: bytes, flags: int) -> int:
        if path == b"goes":
            (tmp_path / "goes").rmdir()
            if becomes == "file":
                (tmp_path / "goes").touch()
            elif becomes == "link":
                (tmp_path / "goes").symlink_to("stays")
        return open_beneath(root, path, flags)

    monkeypatch.setattr(usage, "open_beneath", late)
    with folder_descriptor(tmp_path) as top:
        assert measure(top)[1] == 2


def test_a_file_that_goes_meanwhile_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        (tmp_path / str(number)).touch()
    scandir = os.scandir

    @contextmanager
    def late(folder: int) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            found = list(entries)
        (tmp_path / "1").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", late)
    with folder_descriptor(tmp_path) as top:
        assert measure(top)[1] == 2
