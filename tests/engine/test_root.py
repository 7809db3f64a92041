"""The folder of a store: modes, format, whose it is, and several processes in it at once."""

import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from engine.errors import (
    DataLoss,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from engine.kv.environment import Environment
from engine.kv.schema import FORMAT, HOLDINGS, LEASE_ITEMS, MENTIONS, Lease
from engine.metadata import ledger
from engine.metadata.lineage import Committing, MetaStore
from engine.root import Root, open_blobs, open_root
from engine.snapshots import Commit, Kind, Usage
from engine.stores import open_stores
from tests.conftest import AMD64
from tests.engine.image_files import records


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process of its own: a root can be opened once per process."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.lstat().st_mode) for p in folder.rglob("*")}


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_nobody_else_may_look_in(tmp_path, mask):
    os.umask(mask)
    with Root(tmp_path / "root") as root:
        for path in (root.path, *root.path.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_layout(tmp_path):
    with Root(tmp_path / "root"):
        pass
    assert set(os.listdir(tmp_path / "root")) == {
        *("format", "lock", "owners", "readers", "meta.lmdb", "blobs.lmdb"),
        *("snapshots", "trash", "reserve"),
    }
    assert (tmp_path / "root" / "format").read_text() == f"{FORMAT}\n"


def test_parents_are_made(tmp_path):
    with Root(tmp_path / "a" / "b" / "root") as root:
        assert root.path.is_dir()


def test_opened_again(tmp_path):
    with Root(tmp_path / "root"):
        pass
    before = tree(tmp_path / "root")
    with Root(tmp_path / "root"):
        assert tree(tmp_path / "root") == before


def test_a_root_that_others_could_enter_is_closed_to_them(tmp_path):
    with Root(tmp_path / "root"):
        pass
    (tmp_path / "root").chmod(0o755)
    with Root(tmp_path / "root") as root:
        assert stat.S_IMODE(root.path.stat().st_mode) == 0o700


def test_an_empty_folder_becomes_a_root(tmp_path):
    (tmp_path / "root").mkdir(mode=0o755)
    with Root(tmp_path / "root") as root:
        assert stat.S_IMODE(root.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o700, 0o755])
@pytest.mark.parametrize(
    "names", [["notes"], ["lock", "notes"], ["meta.lmdb"], [".hidden"], ["formats"]]
)
def test_a_folder_of_something_else_is_left_alone(tmp_path, mode, names):
    folder = tmp_path / "mine"
    folder.mkdir(mode=mode)
    for name in names:
        (folder / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InvalidArgument, match="empty folder"):
        Root(folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("left", [["lock"], ["lock", "format.123"]])
def test_a_root_whose_maker_died_is_made_again(tmp_path, left):
    """A crash between the first two files must not lock everyone out."""
    (tmp_path / "root").mkdir(mode=0o700)
    for name in left:
        (tmp_path / "root" / name).touch(0o600)
    with Root(tmp_path / "root"):
        pass


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{FORMAT + 1}\n", "upgrade lamina"),
        ("999999", "upgrade lamina"),
        ("", "does not hold a version"),
        ("one", "does not hold a version"),
        ("1.5", "does not hold a version"),
        ("\u0661", "does not hold a version"),
    ],
)
def test_format_that_is_not_ours(tmp_path, text, reason):
    with Root(tmp_path / "root"):
        pass
    (tmp_path / "root" / "format").write_text(text, encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(FailedPrecondition, match=reason):
        Root(tmp_path / "root")
    assert tree(tmp_path) == before


def test_a_newer_root_is_not_touched(tmp_path):
    """Not even by what a root of ours would have and that one has not."""
    (tmp_path / "root").mkdir(mode=0o700)
    (tmp_path / "root" / "format").write_text(str(FORMAT + 1))
    with pytest.raises(FailedPrecondition):
        Root(tmp_path / "root")
    assert set(os.listdir(tmp_path / "root")) <= {"format", "lock"}


@pytest.mark.parametrize("name", ["a,b", "a:b", "a\\b"])
def test_names_that_mounts_cannot_hold(tmp_path, name):
    with pytest.raises(InvalidArgument, match="cannot be mounted"):
        Root(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_names_with_blanks_and_more_are_fine(tmp_path):
    with Root(tmp_path / "a b=é%s'\"") as root:
        assert root.path.name == "a b=é%s'\""


def test_bk_06_a_link_to_a_root_is_that_root(tmp_path):
    (tmp_path / "link").symlink_to("real")
    with Root(tmp_path / "link") as root:
        assert root.path == tmp_path / "real"


def test_a_link_to_an_unsafe_name(tmp_path):
    (tmp_path / "link").symlink_to("a:b")
    with pytest.raises(InvalidArgument, match="cannot be mounted"):
        Root(tmp_path / "link")


@pytest.mark.parametrize("inside", ["snapshots", "trash", "owners", "meta.lmdb", "blobs.lmdb"])
def test_links_inside_are_not_followed(tmp_path, inside):
    with Root(tmp_path / "root"):
        pass
    away = tmp_path / "away"
    (tmp_path / "root" / inside).rename(away)
    (tmp_path / "root" / inside).symlink_to(away)
    with pytest.raises(FailedPrecondition, match="not a folder of lamina"):
        Root(tmp_path / "root")


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "root").mkdir(mode=0o700)
    (tmp_path / "root" / "lock").symlink_to(tmp_path / "away")
    with pytest.raises(EngineError):
        Root(tmp_path / "root")
    assert not (tmp_path / "away").exists()


def test_a_file_is_no_root(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="not a folder"):
        Root(tmp_path / "file")
    with pytest.raises(FailedPrecondition):
        Root(tmp_path / "file" / "below")


@pytest.mark.root
def test_a_root_of_another_user(tmp_path):
    (tmp_path / "root").mkdir()
    os.chown(tmp_path / "root", 4242, 4242)
    with pytest.raises(PermissionDenied, match="4242"):
        Root(tmp_path / "root")


def test_a_root_that_someone_has_for_himself(tmp_path):
    with Root(tmp_path / "root"):
        pass
    with (tmp_path / "root" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FailedPrecondition, match="locked by another process"):
            Root(tmp_path / "root")
    with Root(tmp_path / "root"):
        pass


def test_nobody_has_an_open_root_for_himself(tmp_path):
    with Root(tmp_path / "root") as root:
        with (root.path / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        root.close()
        with (root.path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_refused_root_lets_go_of_everything(tmp_path):
    with Root(tmp_path / "root"):
        pass
    (tmp_path / "root" / "format").write_text("3")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FailedPrecondition):
        Root(tmp_path / "root")
    assert len(os.listdir("/proc/self/fd")) == before


_OPEN = """
import sys
from pathlib import Path
from engine.root import Root
sys.stdin.readline()
for number in range(20):
    with Root(Path(sys.argv[1])) as root:
        with root.blobs.write() as txn:
            txn.raw.put(f"{sys.argv[2]} {number}".encode(), b"x")
"""


def test_processes_make_and_use_one_root(tmp_path):
    """All begin with nothing there, at the same moment."""
    children = [run(_OPEN, tmp_path / "root", name) for name in range(4)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0] * 4
    with Root(tmp_path / "root") as root, root.blobs.read() as txn:
        assert txn.raw.stat()["entries"] == 80
    assert not list((tmp_path / "root").glob("format.*"))


def test_workers_only_read_blobs(tmp_path):
    with Root(tmp_path / "root"):
        pass
    with open_blobs(tmp_path / "root") as blobs, pytest.raises(PermissionDenied), blobs.write():
        pass


def test_no_root_for_a_worker(tmp_path):
    with pytest.raises(NotFound), open_blobs(tmp_path / "absent"):
        pass


def test_a_full_map_is_an_error_and_undoes_the_write(tmp_path):
    (tmp_path / "small").mkdir()
    small = Environment(tmp_path / "small", map_bytes=1 << 16)
    try:
        with small.write() as txn:
            txn.raw.put(b"before", b"x")
        with pytest.raises(ResourceExhausted), small.write() as txn:  # noqa: PT012  which put fails is LMDB's choice
            for number in range(1000):
                txn.raw.put(b"%d" % number, bytes(1000))
        with small.read() as txn:
            assert txn.raw.stat()["entries"] == 1
        with small.write() as txn:
            txn.raw.put(b"after", b"x")
    finally:
        small.close()


def test_a_file_that_is_not_lmdb(tmp_path):
    with Root(tmp_path / "root"):
        pass
    (tmp_path / "root" / "meta.lmdb" / "data.mdb").write_bytes(b"x" * 8192)
    with pytest.raises(EngineError, match="backup"):
        Root(tmp_path / "root")


def test_the_collector_may_end_a_forgotten_root_while_another_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a KeyboardInterrupt, which leaves generators to it."""
    forgotten = open_root(tmp_path / "forgotten")
    forgotten.__enter__()

    def collecting(path: Path, **options: bool) -> Root:
        forgotten.__exit__(None, None, None)
        return Root(path, **options)

    monkeypatch.setattr("engine.root.Root", collecting)
    done: list[Path] = []

    def opening() -> None:
        with open_root(tmp_path / "other") as root:
            done.append(root.path)

    thread = threading.Thread(target=opening, daemon=True)
    thread.start()
    thread.join(10)
    assert done == [tmp_path / "other"]


def as_format_1(path):
    """Make of a store what format 1 was: it knew only the children of snapshots by who is mentioned."""
    with Root(path) as root, root.meta.write() as txn:
        MENTIONS.clear(txn)
        HOLDINGS.clear(txn)
        for item in LEASE_ITEMS.scan(txn):
            LEASE_ITEMS.delete(txn, "default", "lease", item.kind, item.backend, item.key)
            old = msgspec.structs.replace(item, kind=item.kind.replace("snapshots", "snapshot"))
            LEASE_ITEMS.put(txn, old, "default", "lease", old.kind, old.backend, old.key)
    (path / "format").write_text("1\n")


def test_a_store_of_format_1_is_brought_up(tmp_path):
    path = tmp_path / "root"
    with open_stores(path, "default", AMD64) as stores:
        with stores.root.meta.write() as txn:
            ledger.put(txn, "default", Lease(id="lease", created=1))
        with stores.content.ingest("x", lease="lease") as writer:
            writer.write(b"x")
            digest = writer.commit({"containerd.io/gc.ref.snapshot.overlay": "top"}).digest
        for name, parent in (("below", ""), ("top", "below")):
            store = MetaStore(stores.root.meta, "overlay", "default")
            store.create("making", Kind.ACTIVE, parent, {}, "lease")
            store.commit(Committing(Commit(name=name, key="making", lease="lease"), Usage(1, 1)))
        before = records(stores)
    as_format_1(path)
    with pytest.raises(FailedPrecondition, match="brings it up"):
        Root(path, readonly=True)
    other = os.open(path / "lock", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    with pytest.raises(FailedPrecondition, match="in use"):
        Root(path)
    os.close(other)
    assert (path / "format").read_text() == "1\n"
    with open_stores(path, "default", AMD64) as stores:
        assert records(stores) == before
        assert stores.collect(dry_run=True).snapshots == []
        with pytest.raises(FailedPrecondition, match="children"):
            MetaStore(stores.root.meta, "overlay", "default").remove("below")
        with pytest.raises(FailedPrecondition, match="lease lease"):
            stores.remove_blob(digest)
    assert (path / "format").read_text() == f"{FORMAT}\n"


@pytest.fixture
def used(tmp_path):
    """Return a root that has a blob and a snapshot."""
    path = tmp_path / "root"
    with open_stores(path, "default", AMD64) as stores:
        with stores.content.ingest("x", lease="") as writer:
            writer.write(bytes(50_000_000))
            writer.commit()
        stores.snapshotter("copy").prepare("work")
    return path


@pytest.mark.root
@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("name", ["meta.lmdb", "blobs.lmdb"])
@pytest.mark.parametrize("size", [None, 0, 20_000])
def test_a_file_that_is_gone_or_cut_is_never_made_anew(used, name, size, readonly):
    """Numbers would begin again, and what the other file and the folders have would be garbage."""
    data = used / name / "data.mdb"
    if size is None:
        data.unlink()
    else:
        os.truncate(data, size)
    before = sorted(used.rglob("*"))
    with pytest.raises(DataLoss, match="restore it from a backup"):
        Root(used, readonly=readonly)
    assert {path for path in before if path.name != "lock.mdb"} <= set(used.rglob("*"))
