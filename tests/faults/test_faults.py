"""Failing calls, a full disk, a file system that turns read-only, few descriptors: nothing is lost.

`python -m tests.faults` goes through every call of some commands.
"""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.fs.durable import flush_file_system
from tests.command import LAMINA, environment, lamina
from tests.faults.harness import (
    COMMANDS,
    KILL,
    Outcome,
    assert_kept,
    assert_whole,
    copied,
    run_with,
    template,
)
from tests.filesystems import formatted, shared_memory
from tests.processes import until

pytestmark = [pytest.mark.crash, pytest.mark.root]

# Command, call, error, which of its calls (`+`: and all after it), and the exit code. strace counts each
# thread's calls, and which thread does what may differ: only numbers that one always reaches.
_CALLS = (
    ("import", "pwrite64", "EIO", "2", 1),
    ("import", "pwrite64", "EIO", "12", 1),
    ("import", "pwrite64", "EIO", "14+", 1),
    ("import", "pwrite64", "ENOSPC", "10+", 8),
    ("import", "fdatasync", "EIO", "3", 1),
    ("import", "fdatasync", "EIO", "4+", 1),
    ("import", "fsync", "EIO", "4", 1),
    ("import", "syncfs", "EIO", "1", 1),
    ("import", "rename", "EIO", "1", 1),
    ("gc", "pwrite64", "EIO", "3", 1),
    ("gc", "pwrite64", "EIO", "9+", 1),
    ("gc", "fdatasync", "EIO", "3", 1),
    ("gc", "rename", "EIO", "1+", 1),
    ("gc", "unlinkat", "EIO", "1+", 1),
    ("label", "pwrite64", "EIO", "1", 1),
    ("label", "fdatasync", "EIO", "1", 1),
    ("rm", "pwrite64", "ENOSPC", "1+", 8),
    ("rm", "fdatasync", "EIO", "1", 1),
    ("fsck", "fsync", "EIO", "1", 1),
)
# At which of its calls a command, or a worker of it, is killed.
_DEATHS = (
    ("import", "pwrite64", "7"),
    ("import", "pwrite64", "15"),
    ("import", "fdatasync", "4"),
    ("import", "mkdir", "5"),
    ("import", "syncfs", "1"),
    ("import", "rename", "1"),
    ("gc", "pwrite64", "5"),
    ("gc", "rename", "1"),
    ("gc", "unlinkat", "1"),
    ("rm", "fdatasync", "1"),
)
# What is left free, in KiB, of a disk that the command needs more of, or less.
_LEFT = (
    *(("import", left) for left in (0, 64, 256, 512, 1024, 4096)),
    *((command, 0) for command in ("label", "rm", "gc", "fsck")),
    ("gc", 64),
)
# Where a file system turns read-only below a command.
_TURNS = (
    ("import", "content.commit.before"),
    ("import", "snapshot.prepare.made"),
    ("gc", "gc.marked"),
    ("gc", "trash.moved"),
)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    with shared_memory() as folder:
        yield template(folder / "images")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system that turns read-only when it meets an error."""
    top = tmp_path_factory.mktemp("disk")
    (top / "disk").mkdir()
    with formatted("ext4", top / "image", top / "disk", "errors=remount-ro") as folder:
        yield folder
    shutil.rmtree(top)


@pytest.mark.parametrize(("command", "call", "error", "when", "code"), _CALLS)
def test_a_call_that_fails_loses_nothing(made, tmp_path, command, call, error, when, code):
    root = copied(made, tmp_path)
    done = run_with(made, root, command, call, error, when)
    assert done.injected, "no call failed"
    assert done.code == code, done.messages
    assert_whole(made, root, command, done)


@pytest.mark.parametrize(("command", "call", "when"), _DEATHS)
def test_p5_dying_at_a_call_leaves_the_old_or_the_new(made, tmp_path, command, call, when):
    root = copied(made, tmp_path)
    done = run_with(made, root, command, call, KILL, when)
    assert done.injected, "the call was not reached"
    assert_whole(made, root, command, done)


def _fill(disk: Path, left: int) -> Path:
    """Fill a file system but for `left` bytes; return what fills it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        for size in (1 << 20, 64 << 10, 4096):
            try:
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                continue
        file.truncate(max(0, os.fstat(file.fileno()).st_size - left))
    return ballast


@pytest.mark.parametrize(("command", "left"), _LEFT)
def test_a_full_disk_loses_nothing(made, disk, command, left):
    place = disk / "place"
    place.mkdir()
    root = copied(made, place)
    ballast = _fill(disk, left << 10)
    try:
        words = [word.format(images=made) for word in COMMANDS[command]]
        done = subprocess.run(
            [*LAMINA, "--root", str(root), *words],
            check=False,
            capture_output=True,
            text=True,
            env=environment(),
        )
        assert done.returncode in {0, 8}, done.stderr
        assert_kept(root)
    finally:
        ballast.unlink()
    assert_whole(made, root, command, Outcome(done.returncode, done.stderr, 1))
    shutil.rmtree(place)


@pytest.mark.parametrize(("command", "point"), _TURNS)
def test_a_file_system_that_turns_read_only_loses_nothing(made, tmp_path, command, point):
    (tmp_path / "disk").mkdir()
    with formatted("ext4", tmp_path / "image", tmp_path / "disk", "errors=remount-ro") as disk:
        root = copied(made, disk)
        flush_file_system(disk)
        words = [word.format(images=made) for word in COMMANDS[command]]
        process = subprocess.Popen(
            [*LAMINA, "--root", str(root), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(f"{point}=stop"),
        )
        try:
            until(lambda: _state(process.pid) == "T")
            _turn_read_only(disk)
        finally:
            process.send_signal(signal.SIGCONT)
            _, messages = process.communicate(timeout=60)
        done = Outcome(process.returncode, messages, 1)
        assert done.code, "it did not notice"
        assert "Read-only" in messages or "read-only" in messages or "nput/output" in messages
    subprocess.run(["e2fsck", "-pf", tmp_path / "image"], check=False, capture_output=True)
    device = subprocess.run(
        ["mount", "-o", "loop", tmp_path / "image", tmp_path / "disk"], check=False, capture_output=True
    )
    assert device.returncode == 0, device.stderr
    try:
        assert_whole(made, root, command, done)
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def _state(pid: int) -> str:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return stat.rpartition(") ")[2].split()[0]


def _turn_read_only(disk: Path) -> None:
    """Have the file system find an error (Documentation/admin-guide/ext4.rst, trigger_fs_error)."""
    number = os.stat(disk).st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    Path(f"/sys/fs/ext4/{block}/trigger_fs_error").write_text("1", encoding="ascii")


@pytest.mark.parametrize(
    ("command", "files"), [*(("import", n) for n in (16, 24, 32, 64)), ("gc", 64), ("fsck", 64)]
)
def test_few_descriptors_lose_nothing(made, tmp_path, command, files):
    root = copied(made, tmp_path)
    words = [word.format(images=made) for word in COMMANDS[command]]
    done = subprocess.run(
        [*LAMINA, "--root", str(root), *words],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert done.returncode == 0 or files < 64, done.stderr
    assert_whole(made, root, command, Outcome(done.returncode, done.stderr, 1))
    lamina(root, "images")
