"""One LMDB file under pressure: writers that do not end, maps that are too small, a full disk."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import EngineError, PermissionDenied, ResourceExhausted, Unavailable
from engine.kv import environment, opening, turn
from engine.kv.environment import Environment
from engine.kv.gate import Gate
from engine.mount import Mount, deactivate, mounted
from tests.conftest import peer
from tests.processes import kill, ready

_TOO_MUCH = 1 << 50  # bytes of address space that no process has (x86-64: 1 << 47)
_ENOUGH = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").mkdir()
    return tmp_path / "file"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "WAIT_S", 0.05)


def fill(file: Environment, name: str, size: int) -> None:
    with file.write() as txn:
        for number in range(size >> 20):
            txn.raw.put(f"{name} {number}".encode(), bytes((1 << 20) - 16))


def entries(file: Environment) -> int:
    with file.read() as txn:
        return int(txn.raw.stat()["entries"])


# -- whose turn it is -------------------------------------------------------------------------

_WRITER = """
import os, signal, sys
from pathlib import Path
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 30)
with file.write() as txn:
    txn.raw.put(b"undone", b"x")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_stopped_writer_is_named_and_nobody_waits_for_ever(folder, impatient):
    file = Environment(folder, map_bytes=_ENOUGH)
    stopped = ready(_WRITER, folder)
    try:
        with pytest.raises(Unavailable, match=f"process {stopped.pid} has been writing"), file.write():
            pass
        assert entries(file) == 0  # reading waits for nobody
        file.close()
        with pytest.raises(Unavailable, match="see whether it was stopped"):
            Environment(folder, map_bytes=_ENOUGH, tables=["a"])
        # Who has no table to make waits for nobody: a label opens what someone writes bytes to.
        Environment(folder, map_bytes=_ENOUGH).close()
        reader = Environment(folder, map_bytes=_ENOUGH, readonly=True)
        assert entries(reader) == 0
        reader.close()
    finally:
        kill(stopped)
    again = Environment(folder, map_bytes=_ENOUGH)  # its turn ended with it, its writes are undone
    fill(again, "a", 1 << 20)
    assert entries(again) == 1
    again.close()


def test_a_thread_that_does_not_end_its_write(folder, impatient):
    file = Environment(folder, map_bytes=_ENOUGH)
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with file.write():
            begun.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    with pytest.raises(Unavailable, match="another thread of this process"), file.write():
        pass
    end.set()
    thread.join()
    with file.write():
        pass
    file.close()


def test_one_process_opens_a_file_once(folder):
    file = Environment(folder, map_bytes=_ENOUGH)
    (folder.parent / "link").symlink_to(folder)
    for path in (folder, folder.parent / "link"):
        with pytest.raises(EngineError, match="share one engine"):
            Environment(path, map_bytes=_ENOUGH)
    # A descriptor of lock.mdb that is closed takes the locks of the first opening with it.
    locks = Path("/proc/locks").read_text(encoding="ascii")
    inode = (folder / "lock.mdb").stat().st_ino
    assert f":{inode} " in locks
    file.close()


# -- maps -------------------------------------------------------------------------------------


@pytest.fixture
def little_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (opening, environment):
        monkeypatch.setattr(module, "HEADROOM", 16 << 20)


def mapped_bytes(file: Environment) -> int:
    return int(file._env.info()["map_size"])


def test_a_map_grows_when_it_must(folder, little_headroom):
    file = Environment(folder, map_bytes=_TOO_MUCH)
    sizes = []
    for number in range(16):
        fill(file, str(number), 8 << 20)
        sizes.append(mapped_bytes(file))
    assert sizes[0] < 64 << 20 < 128 << 20 < sizes[-1] < _TOO_MUCH
    assert entries(file) == 128
    file.close()
    with_room = Environment(folder, map_bytes=_ENOUGH)
    assert mapped_bytes(with_room) == _ENOUGH
    assert entries(with_room) == 128
    with_room.close()


@pytest.mark.parametrize(
    ("map_bytes", "says"), [(_TOO_MUCH, r"address space .*ulimit -v"), (64 << 20, "its largest size")]
)
def test_memory_that_ran_out_is_not_a_store_that_is_full(
    folder, little_headroom, monkeypatch, map_bytes, says
):
    file = Environment(folder, map_bytes=map_bytes)
    monkeypatch.setattr(file, "_map_anew", lambda: None)  # there is no memory for a larger map
    with pytest.raises(ResourceExhausted, match=says):
        fill(file, "much", 128 << 20)
    file.close()


_GROWER = """
import sys
from pathlib import Path
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 30)
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    with file.write() as txn:
        for part in range(8):
            txn.raw.put(b"%d %d" % (number, part), bytes((1 << 20) - 16))
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("readonly", [False, True])
def test_another_process_makes_the_file_larger_than_the_map(folder, little_headroom, readonly):
    grower = ready(_GROWER, folder)
    try:
        file = Environment(folder, map_bytes=_TOO_MUCH, readonly=readonly)
        before = mapped_bytes(file)
        assert grower.stdin is not None
        assert grower.stdout is not None
        grower.stdin.write("go\n")
        grower.stdin.flush()
        assert grower.stdout.readline() == "done\n"
        assert before < (folder / "data.mdb").stat().st_size
        assert entries(file) == 64
        assert mapped_bytes(file) > before
        if not readonly:
            fill(file, "more", 8 << 20)
            assert entries(file) == 72
        file.close()
    finally:
        grower.communicate("end\n")


def test_a_map_that_cannot_grow_is_an_error_that_undoes_nothing(folder, little_headroom, monkeypatch):
    small = 24 << 20
    real = opening._open

    def limited(path, map_bytes, tables, *, readonly):
        if map_bytes > small:
            raise opening.lmdb.MemoryError("Cannot allocate memory")
        return real(path, map_bytes, tables, readonly=readonly)

    monkeypatch.setattr(opening, "_open", limited)
    file = Environment(folder, map_bytes=_TOO_MUCH)
    with pytest.raises(ResourceExhausted):  # noqa: PT012  which write fails is LMDB's choice
        for number in range(8):
            fill(file, str(number), 8 << 20)
    kept = entries(file)
    assert kept in {8, 16}
    file.close()


def test_a_map_that_could_not_be_made_anew_is_made_by_who_comes_next(
    folder, little_headroom, monkeypatch
):
    file = Environment(folder, map_bytes=_TOO_MUCH)
    fill(file, "a", 8 << 20)

    def refuses(*_arguments, **_more):
        raise environment.lmdb.MemoryError("Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(environment, "open_file", refuses)
        with pytest.raises(ResourceExhausted, match="out of memory"):  # noqa: PT012  as above
            for number in range(8):
                fill(file, str(number), 8 << 20)
        for use in (file.read, file.write):
            with pytest.raises(ResourceExhausted, match="out of memory"), use():
                pass
    kept = entries(file)
    assert kept >= 8
    fill(file, "b", 8 << 20)
    assert entries(file) == kept + 8
    file.close()


# -- readers ----------------------------------------------------------------------------------

_READER = """
import os, signal, sys
from pathlib import Path
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 30, readonly=True)
with file.read() as txn:
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def readers(file: Environment) -> str:
    return str(file._env.readers())


@pytest.mark.parametrize("moment", ["when it is asked for", "at the next open"])
def test_a_dead_reader_keeps_no_pages(folder, moment):
    file = Environment(folder, map_bytes=_ENOUGH)
    fill(file, "a", 1 << 20)
    alive, dead = ready(_READER, folder), ready(_READER, folder)
    try:
        file.check_readers()
        assert str(dead.pid) in readers(file), "it is alive"
    finally:
        kill(dead)
    try:
        assert str(dead.pid) in readers(file)
        if moment == "at the next open":
            file.close()
            file = Environment(folder, map_bytes=_ENOUGH)
        else:
            file.check_readers()
        assert str(dead.pid) not in readers(file)
        assert str(alive.pid) in readers(file)
    finally:
        kill(alive)
    file.close()


def test_growing_waits_for_who_reads_and_holds_up_who_comes(folder, little_headroom):
    """A reader on another thread keeps its view; the map changes when it is done."""
    file = Environment(folder, map_bytes=_TOO_MUCH)
    fill(file, "a", 8 << 20)
    before = mapped_bytes(file)
    with file.read() as txn:
        value = txn.raw.get(b"a 0")
        thread = threading.Thread(
            target=lambda: [fill(file, str(number), 8 << 20) for number in range(8)]
        )
        thread.start()
        with file.read() as inner:  # of the same thread: it may not wait for itself
            assert inner.raw.get(b"a 0") == value
    thread.join()
    assert entries(file) == 72
    assert mapped_bytes(file) > before
    file.close()


def test_growing_gives_up_on_who_does_not_end(folder, little_headroom, impatient):
    """A write within a read on one thread would wait for itself: it goes on in the map there is."""
    file = Environment(folder, map_bytes=_TOO_MUCH)
    before = mapped_bytes(file)
    with file.read():
        fill(file, "a", 8 << 20)
        fill(file, "b", 8 << 20)
        assert mapped_bytes(file) == before
    fill(file, "c", 8 << 20)
    assert mapped_bytes(file) > before
    assert entries(file) == 24
    file.close()


def test_a_gate_lets_nobody_in_while_one_is_alone():
    gate = Gate()
    order = []

    def come() -> None:
        with gate.inside():
            order.append("in")

    with gate.alone(1) as free:
        assert free
        thread = threading.Thread(target=come)
        thread.start()
        order.append("alone")
    thread.join()
    assert order == ["alone", "in"]


_LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from engine.root import Root
with Root(Path(sys.argv[1])) as root:
    for number in range(24):
        with root.blobs.write() as txn:
            for part in range(8):
                txn.raw.put(b"%d %d" % (number, part), bytes((1 << 20) - 16))
    with root.blobs.read() as txn:
        print(txn.raw.stat()["entries"], root.blobs._env.info()["map_size"])
"""


def test_a_store_in_a_gibibyte_of_address_space(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LIMITED, str(tmp_path / "root")],
        check=True,
        capture_output=True,
        text=True,
    )
    found, size = map(int, done.stdout.split())
    assert found == 192
    assert 192 << 20 < size < 1 << 30


# -- disks and descriptors --------------------------------------------------------------------


def test_lmdb_takes_the_lock_file_as_it_was_made(folder):
    """The size is LMDB's own: one that it would change again would be sparse again."""
    import lmdb

    (folder / "own").mkdir()
    own = lmdb.open(str(folder / "own"), max_readers=opening.READERS, lib_version=0)
    expected = (folder / "own" / "lock.mdb").stat().st_size
    own.close()
    opening.allocate_lock(folder, readonly=False)
    made = (folder / "lock.mdb").stat()
    assert made.st_size == expected
    assert made.st_blocks * 512 >= expected
    file = Environment(folder, map_bytes=_ENOUGH)
    info = (folder / "lock.mdb").stat()
    assert (info.st_size, file._env.info()["max_readers"]) == (expected, opening.READERS)
    file.close()


@pytest.mark.root
def test_a_lock_file_on_btrfs_is_written_in_place(tmp_path):
    """Elsewhere each write through the map takes a new block, and a full disk is a SIGBUS."""
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(128 << 20)
    subprocess.run([peer("mkfs.btrfs"), "-q", "-M", disk.name], check=True, capture_output=True)
    (tmp_path / "on").mkdir()
    subprocess.run(["mount", "-o", "loop", disk.name, tmp_path / "on"], check=True)
    try:
        opening.allocate_lock(tmp_path / "on", readonly=False)
        with (tmp_path / "on" / "lock.mdb").open("rb") as lock:
            flags = bytearray(8)
            fcntl.ioctl(lock, opening._GET_FLAGS, flags)
        assert int.from_bytes(flags, sys.byteorder) & opening._NOCOW
    finally:
        deactivate(tmp_path / "on")


@pytest.mark.root
def test_a_file_that_a_full_disk_cut_short_is_begun_again(tmp_path):
    (tmp_path / "small").mkdir()
    disk = Mount(type="tmpfs", source="tmpfs", options=["size=256k"])
    with mounted([disk], tmp_path / "small"):
        folder = tmp_path / "small" / "file"
        folder.mkdir()
        ballast = folder.parent / "ballast"
        disk_left = os.statvfs(folder)
        with ballast.open("wb") as taken:
            # What stays is enough for the lock file and one of the two pages of the data.
            left = opening._LOCK_BYTES // 4096 + 2
            os.posix_fallocate(taken.fileno(), 0, (disk_left.f_bavail - left) * disk_left.f_frsize)
        with pytest.raises(ResourceExhausted, match="no space"):
            Environment(folder, map_bytes=_ENOUGH)
        ballast.unlink()
        file = Environment(folder, map_bytes=_ENOUGH)
        file.close()


def test_a_file_has_its_name_once_it_can_be_opened(folder, monkeypatch):
    """LMDB flushes its first two pages with the first commit: a power cut before that leaves zeros."""
    seen = []

    def watched(file):
        seen.append((os.readlink(f"/proc/self/fd/{file}"), os.listdir(folder), os.fstat(file).st_size))
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        with pytest.raises(EngineError):
            Environment(folder, map_bytes=_ENOUGH)
    ((name, names, size),) = seen
    assert name == str(folder / "making" / "data.mdb")
    assert "data.mdb" not in names
    assert size == 2 * 4096
    (folder / "making" / "data.mdb").write_bytes(bytes(8192))
    file = Environment(folder, map_bytes=_ENOUGH)
    assert sorted(os.listdir(folder)) == ["data.mdb", "lock.mdb", "queue", "writer"]
    file.close()


def test_too_many_open_files_is_a_typed_error(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, hard))
    try:
        with pytest.raises(ResourceExhausted, match="too many open files"):
            Environment(folder, map_bytes=_ENOUGH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    Environment(folder, map_bytes=_ENOUGH).close()


def test_a_reader_may_not_write_and_makes_nothing(folder):
    with pytest.raises(EngineError, match="nothing in it yet"):
        Environment(folder, map_bytes=_ENOUGH, readonly=True)
    assert not (folder / "data.mdb").exists()
    Environment(folder, map_bytes=_ENOUGH).close()
    file = Environment(folder, map_bytes=_ENOUGH, readonly=True, tables=("later",))
    with pytest.raises(PermissionDenied, match="opened read-only"), file.write():
        pass
    file.close()
