"""`lamina compact`: files as small as what they hold; others are named, a crash loses nothing."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from lmdb import verify

from engine import failpoints
from engine.cli.output import human_bytes
from engine.compacting import compact_store
from engine.errors import DataLoss, FailedPrecondition, ResourceExhausted
from engine.kv.environment import Environment
from engine.kv.schema import EXTENT
from engine.oci.digest import Digest, digest_of
from engine.root import Root, open_root
from engine.stores import Stores
from tests.command import LAMINA, environment, lamina, lamina_json
from tests.conftest import AMD64
from tests.filesystems import formatted
from tests.processes import kill, ready

_KEPT = [bytes([number]) * (EXTENT + number) for number in range(1, 4)]
_DROPPED = [bytes([number]) * EXTENT for number in range(10, 22)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store that held four times as much: fragmented, and without a hole."""
    path = tmp_path / "root"
    fill(path)
    return path


def fill(path: Path) -> None:
    with Root(path) as root:
        content = Stores(root, "default", AMD64).content
        for data in (*_DROPPED[:6], *_KEPT, *_DROPPED[6:]):
            with content.ingest(digest_of(data), lease="") as writer:
                writer.write(data)
                writer.commit()
        for data in _DROPPED:
            content.delete(digest_of(data))
        content.cleanup()


def assert_kept(path: Path) -> None:
    with Root(path) as root:
        content = Stores(root, "default", AMD64).content
        assert {blob.digest for blob in content.walk()} == {digest_of(data) for data in _KEPT}
        for blob in content.walk():
            content.verify(Digest(blob.digest))
    for name in ("meta.lmdb", "blobs.lmdb"):
        assert verify.verify(str(path / name / "data.mdb")) == []
        assert not (path / name / "data.new").exists()


def sizes(path: Path) -> tuple[int, int]:
    info = (path / "blobs.lmdb" / "data.mdb").stat()
    return info.st_size, info.st_blocks * 512


def test_a_store_is_as_small_as_what_it_holds(root: Path) -> None:
    before = sizes(root)
    assert before[0] > 15 << 20
    meta, blobs = lamina_json(root, "compact")
    assert (meta["name"], blobs["name"]) == ("meta.lmdb", "blobs.lmdb")
    assert meta["size_before"] == meta["size"], "so little is not worth a copy"
    assert (blobs["size_before"], blobs["disk_before"]) == before
    assert (blobs["size"], blobs["disk"]) == sizes(root)
    assert blobs["size"] < 5 << 20
    assert_kept(root)
    inode = (root / "blobs.lmdb" / "data.mdb").stat().st_ino
    assert f"blobs.lmdb: {human_bytes(blobs['disk'])} -> " in lamina(root, "compact").stderr
    assert (root / "blobs.lmdb" / "data.mdb").stat().st_ino == inode, "there is nothing to gain"


def test_it_is_written_again_after_that(root: Path) -> None:
    """A file of readers that tells of the old file's transactions would take the new one's for empty."""
    compact_store(root)
    with Root(root) as opened:
        content = Stores(opened, "default", AMD64).content
        with content.ingest("more", lease="") as writer:
            writer.write(_DROPPED[0])
            writer.commit()
        content.verify(digest_of(_DROPPED[0]))
        content.delete(digest_of(_DROPPED[0]))
        content.cleanup()
    assert_kept(root)


_HOLDING = """
import sys
from pathlib import Path
from engine.root import Root, open_blobs
with (Root if sys.argv[2] == "root" else open_blobs)(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_who_is_in_the_way_is_named(root: Path) -> None:
    before = sizes(root)
    processes = [ready(_HOLDING, root, "root"), ready(_HOLDING, root, "blobs")]
    try:
        pids = ", ".join(str(pid) for pid in sorted(process.pid for process in processes))
        message = lamina(root, "compact", code=6).stderr
        assert f"is in use by processes {pids};" in message
        assert len(message.splitlines()) == 1
        kill(processes[0])
        worker = processes[1].pid
        with pytest.raises(FailedPrecondition, match=f"in use by process {worker};"):
            compact_store(root)
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)
    with open_root(root), pytest.raises(FailedPrecondition, match=f"in use by process {os.getpid()};"):
        compact_store(root)
    assert sizes(root) == before
    compact_store(root)
    assert_kept(root)


def test_nobody_comes_in_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []

    def report(*_: object) -> None:
        if not messages:
            for words in (["images"], ["gc"]):
                command = [*LAMINA, "--root", str(root), *words]
                done = subprocess.run(
                    command, check=False, capture_output=True, text=True, env=environment()
                )
                messages.append((done.returncode, done.stderr))

    compact_store(root, report)
    assert [code for code, _ in messages] == [6, 6]
    assert all(f"flock: process {os.getpid()}" in message for _, message in messages)


_POINTS = [(name, 1) for name in sorted(failpoints.NAMES) if name.startswith("compact.")]


@pytest.mark.parametrize(("name", "nth"), [*_POINTS, ("compact.written", 9)])
def test_dying_on_the_way_leaves_the_old_or_the_new(root: Path, name: str, nth: int) -> None:
    before = sizes(root)
    done = subprocess.run(
        [*LAMINA, "--root", str(root), "compact"],
        check=False,
        env=environment(f"{name}=kill@{nth}"),
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (sizes(root) == before) == (name != "compact.renamed")
    assert_kept(root)
    compact_store(root)
    assert sizes(root)[0] < 5 << 20
    assert_kept(root)


@pytest.mark.parametrize("action", ["error", "enospc"])
def test_a_failure_changes_nothing(root: Path, action: str) -> None:
    before = sizes(root)
    with (
        failpoints.armed("compact.written", action, 2),
        pytest.raises(Exception, match=r"failpoint|no space"),
    ):
        compact_store(root)
    assert sizes(root) == before
    assert_kept(root)


def test_a_copy_that_is_not_whole_takes_nobodys_place(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sizes(root)
    monkeypatch.setattr(Environment, "copy_to", lambda _self, sink: os.write(sink, bytes(4096)))
    with pytest.raises(DataLoss, match=r"a copy has 4096 bytes, not .* nothing was changed"):
        compact_store(root)
    monkeypatch.undo()
    assert sizes(root) == before
    assert_kept(root)


def test_what_lmdb_says_of_a_copy_is_the_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_self: Environment, sink: int) -> None:
        os.write(sink, bytes(4096))
        raise DataLoss("a page is missing")

    monkeypatch.setattr(Environment, "copy_to", fails)
    with pytest.raises(DataLoss, match="a page is missing"):
        compact_store(root)
    monkeypatch.undo()
    assert_kept(root)


@pytest.mark.root
def test_room_for_a_copy_is_asked_for_first(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with formatted("ext4", tmp_path / "image", tmp_path / "disk") as disk:
        root = disk / "root"
        fill(root)
        with (disk / "filling").open("wb") as filling:
            free = os.statvfs(disk)
            os.posix_fallocate(filling.fileno(), 0, free.f_bavail * free.f_frsize - (3 << 20))
        with pytest.raises(ResourceExhausted, match="a copy takes 4 MiB"):
            compact_store(root)
        assert json.loads(lamina(root, "compact", "--json", code=8).stdout)["error"]["exit_code"] == 8
        (disk / "filling").unlink()
        compact_store(root)
        assert_kept(root)


def test_what_a_killed_copy_left_goes_at_the_next_open(root: Path) -> None:
    (root / "blobs.lmdb" / "data.new").write_bytes(b"half a copy")
    with Root(root):
        assert not (root / "blobs.lmdb" / "data.new").exists()


def test_progress_ends_at_what_there_is(root: Path) -> None:
    seen: list[tuple[object, ...]] = []
    compact_store(root, lambda *what: seen.append(what))
    assert {(step, name) for step, name, _, _ in seen} == {("copying", "blobs.lmdb")}
    done = [row[3] for row in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == seen[-1][2] == sizes(root)[0]
