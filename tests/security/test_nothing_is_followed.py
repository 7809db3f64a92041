"""What stands where something is made or opened is never followed, whatever order brought it there.

The tree of values already sees to it that names are free (docs/security.md); these tests put a link or a
file in the way all the same, as a fault elsewhere would, and look at what it leads to.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.diff.layer import Attributes, Folder
from engine.diff.tar import Entry, TarReader
from engine.errors import EngineError
from engine.fs.attributes import beneath, folder_descriptor
from engine.fs.kernel import open_beneath
from engine.fs.room import Room
from engine.kv.opening import allocate_lock
from engine.kv.schema import FORMAT
from engine.kv.turn import Turn
from engine.mount import Mount, mounted
from engine.processes import Owners
from engine.recovery import is_in_order, recover
from engine.root import Root
from engine.testing.archives import archive, member
from snapshotters import filling
from snapshotters.descriptors import OpenFolders
from snapshotters.folder_sink import TREE, FolderSink, open_sink
from snapshotters.markers import AufsMarkers, OverlayMarkers
from tests.security.harness import World

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]


def entry(kind: str, **more: Any) -> Entry:
    (found,) = TarReader([archive(member("x", kind, uid=7, gid=8, mtime=5, **more))])
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place" / TREE).mkdir(parents=True)
    return tmp_path / "place"


@contextmanager
def sink_in(place: Path) -> Iterator[FolderSink]:
    with open_sink(str(place)) as sink:
        yield sink


MAKE: dict[str, Callable[[FolderSink, Folder], None]] = {
    "folder": lambda sink, root: sink.make_folder(root, b"x"),
    "file": lambda sink, root: sink.make_file(root, b"x", entry("0"), lambda: iter([memoryview(b"in")])),
    "symlink": lambda sink, root: sink.make_symlink(root, b"x", entry("2", link="there")),
    "node": lambda sink, root: sink.make_node(root, b"x", entry("3", device=(1, 3))),
    "link": lambda sink, root: sink.make_link(root, b"x", (root, b"other"), None),
}


@pytest.mark.parametrize("way", ["link to a file", "link to nothing", "file"])
@pytest.mark.parametrize("make", MAKE)
def test_a_sink_makes_only_what_is_new(make: str, way: str, place: Path, world: World) -> None:
    tree = place / TREE
    (tree / "other").touch()
    if way == "file":
        (tree / "x").write_text("first")
    else:
        (tree / "x").symlink_to(world.victim / ("hello" if way == "link to a file" else "new"))
    before = (tree / "x").lstat()
    with sink_in(place) as sink, pytest.raises(FileExistsError):
        MAKE[make](sink, Folder(None, b""))
    assert (tree / "x").lstat() == before
    world.check_untouched(place)


@pytest.mark.parametrize("make", ["symlink", "node"])
def test_owner_and_time_go_to_what_was_made(make: str, place: Path, world: World) -> None:
    with sink_in(place) as sink:
        root = Folder(None, b"")
        if make == "symlink":
            victim = os.fsencode(world.victim / "hello")
            sink.make_symlink(root, b"x", entry("2", link=victim))
        else:
            MAKE[make](sink, root)
    info = (place / TREE / "x").lstat()
    assert (info.st_uid, info.st_gid, info.st_mtime_ns) == (7, 8, 5_000_000_000)
    world.check_untouched(place)


def test_a_hard_link_to_a_link_is_one_to_the_link(place: Path, world: World) -> None:
    (place / TREE / "l").symlink_to(world.victim / "hello")
    with sink_in(place) as sink:
        root = Folder(None, b"")
        sink.make_link(root, b"x", (root, b"l"), None)
    assert (place / TREE / "x").is_symlink()
    world.check_untouched(place)


def by_sink(place: Path, folder: Folder) -> None:
    with sink_in(place) as sink:
        MAKE["file"](sink, folder)


def by_open_folders(place: Path, folder: Folder) -> None:
    with folder_descriptor(place / TREE) as root, OpenFolders(root) as opened:
        opened.get(folder)


def by_path(place: Path, folder: Folder) -> None:
    with folder_descriptor(place / TREE) as root, beneath(root, folder.name):
        pass


def by_descriptor(place: Path, folder: Folder) -> None:
    with folder_descriptor(place / TREE / os.fsdecode(folder.name)):
        pass


@pytest.mark.parametrize("use", [by_sink, by_open_folders, by_path, by_descriptor])
def test_a_folder_that_is_a_link_is_not_entered(
    use: Callable[[Path, Folder], None], place: Path, world: World
) -> None:
    (place / TREE / "d").symlink_to(world.victim)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        use(place, Folder(Folder(None, b""), b"d"))
    world.check_untouched(place)


def test_folders_get_their_attributes_by_what_they_are(place: Path, world: World) -> None:
    # The last step of a layer goes by name where it is cheap: a link there must not lead it out.
    root = Folder(None, b"")
    root.names[b"d"] = folder = Folder(root, b"d")
    (place / TREE / "d").symlink_to(world.victim)
    for attributes in (Attributes(mtime=9), Attributes(uid=3, mtime=9)):
        folder.attributes = attributes
        with sink_in(place) as sink:
            if attributes.uid:
                with pytest.raises(OSError, match="Not a directory"):
                    sink.finish(root, 0, 0)
            else:
                sink.finish(root, 0, 0)
    world.check_untouched(place)


def test_the_root_of_a_layer_is_always_the_same(place: Path) -> None:
    os.chown(place / TREE, 5, 6)
    (place / TREE).chmod(0o2700)
    with sink_in(place) as sink:
        sink.finish(Folder(None, b""), 0, 0)
    info = (place / TREE).stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid, info.st_mtime) == (0o755, 0, 0, 0)


@pytest.mark.parametrize("markers", [OverlayMarkers(), AufsMarkers()])
def test_a_marker_is_made_anew(markers: OverlayMarkers | AufsMarkers, place: Path, world: World) -> None:
    tree = place / TREE
    for name in (".wh.x", "x", ".wh..wh..opq"):
        (tree / name).symlink_to(world.victim / "hello")
    with folder_descriptor(tree) as opened:
        with pytest.raises(FileExistsError):
            markers.make_whiteout(opened, b"x")
        if isinstance(markers, AufsMarkers):
            with pytest.raises(FileExistsError):
                markers.make_opaque(opened)
    world.check_untouched(place)


def copy_x(source: int, target: int) -> None:
    filling.Copying(target, Room(Path("/")))._copy_file(source, target, b"x")


@pytest.mark.parametrize(("where", "kind"), [("source", "link"), ("target", "link"), ("target", "file")])
def test_a_copy_reads_and_makes_files_only(where: str, kind: str, tmp_path: Path, world: World) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "x").write_text("copied")
    place = tmp_path / where / "x"
    if kind == "link":
        place.unlink(missing_ok=True)
        place.symlink_to(world.victim / "hello")
    else:
        place.write_text("first")
    with (
        folder_descriptor(tmp_path / "source") as old,
        folder_descriptor(tmp_path / "target") as new,
        pytest.raises(OSError, match=r"File exists|symbolic links"),
    ):
        copy_x(old, new)
    if kind == "file":
        assert place.read_text() == "first"
    world.check_untouched(tmp_path / "target")


def test_a_copy_waits_for_no_fifo(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "source" / "x")
    with folder_descriptor(tmp_path / "source") as old, folder_descriptor(tmp_path / "target") as new:
        thread = threading.Thread(target=copy_x, args=(old, new))
        thread.start()
        thread.join(10)
        waits = thread.is_alive()
        os.close(os.open(tmp_path / "source" / "x", os.O_RDWR | os.O_NONBLOCK))  # lets it go
        thread.join()
    assert not waits


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"link", errno.ELOOP),
        (b"link/below", errno.ELOOP),
        (b"d/../../victim", errno.EXDEV),
        (b"/etc", errno.EXDEV),
        (b"d/mounted", errno.EXDEV),
        (b"d/bound", errno.EXDEV),
    ],
)
def test_nothing_is_opened_above_a_folder_nor_beyond_a_mount(
    path: bytes, code: int, tmp_path: Path, world: World
) -> None:
    tree = tmp_path / "tree"
    for name in ("mounted", "bound"):
        (tree / "d" / name).mkdir(parents=True)
    (tree / "link").symlink_to(world.victim)
    other = Mount(type="tmpfs", source="tmpfs", options=[])
    bind = Mount(type="bind", source=str(world.victim), options=["rbind"])  # of the same file system
    with (
        mounted([other], tree / "d" / "mounted"),
        mounted([bind], tree / "d" / "bound"),
        folder_descriptor(tree) as root,
        pytest.raises(OSError, match=os.strerror(code)),
    ):
        open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)


# -- files of the store -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lock", f"format.{os.getpid()}", "reserve"], ids=["lock", "new", "reserve"]
)
def test_a_link_among_the_files_of_a_root_leads_nowhere(name: str, tmp_path: Path, world: World) -> None:
    (tmp_path / "root").mkdir(mode=0o700)
    (tmp_path / "root" / "lock").touch()  # as a maker that died leaves it
    (tmp_path / "root" / name).unlink(missing_ok=True)
    (tmp_path / "root" / name).symlink_to(world.victim / "hello")
    if name == "reserve":
        (tmp_path / "root" / "format").write_text(str(FORMAT))
        with Root(tmp_path / "root"):
            pass
    else:
        with pytest.raises(EngineError, match="symbolic links"), Root(tmp_path / "root"):
            pass
    world.check_untouched(tmp_path / "root")


@pytest.mark.parametrize("name", ["recovery", "boot.new"])
def test_a_link_among_the_files_of_recovery_leads_nowhere(
    name: str, tmp_path: Path, world: World
) -> None:
    with Root(tmp_path / "root") as root:
        (root.path / name).symlink_to(world.victim / "hello")
        recover(root)
        assert not is_in_order(root)
    world.check_untouched(tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "make"),
    [("writer", Turn), ("lock.mdb", lambda folder: allocate_lock(folder, readonly=False))],
)
def test_a_link_among_the_files_of_lmdb_leads_nowhere(
    name: str, make: Callable[[Path], object], tmp_path: Path, world: World
) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / name).symlink_to(world.victim / "hello")
    with pytest.raises(OSError, match="symbolic links"):
        make(tmp_path / "file")
    world.check_untouched(tmp_path / "file")


@pytest.mark.parametrize("to", ["hello", "new"])
def test_an_owners_file_is_its_own(to: str, tmp_path: Path, world: World) -> None:
    (tmp_path / "owners").mkdir()
    owners = Owners(tmp_path / "owners")
    (tmp_path / "owners" / "me").symlink_to(world.victim / to)
    with pytest.raises(FileExistsError):
        owners._locked("me")
    world.check_untouched(tmp_path / "owners")
    (tmp_path / "owners" / "me").unlink()
    held = owners._locked("me")
    assert held is not None
    with pytest.raises(FileExistsError):
        Owners(tmp_path / "owners")._locked("me")
    os.close(held)
