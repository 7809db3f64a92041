"""Who asks first writes first, over processes and threads, whatever becomes of those in line."""

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.kv import turn
from engine.kv.environment import Environment
from engine.kv.line import PlaceInLine, ProcessLine, ThreadLine
from tests.processes import kill, ready, until

_MAP = 1 << 30
_BUSY = """
import sys
from pathlib import Path
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 30)
print("ready", flush=True)
number = 0
while True:
    number += 1
    with file.write() as txn:
        for part in range(20):
            txn.raw.put(b"%d" % part, b"%d" % number)
"""
_WAITING = """
import sys
from pathlib import Path
from engine.kv.line import ProcessLine
line = ProcessLine(Path(sys.argv[1]))
with line.standing() as place:
    place.is_first()
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Environment]:
    (tmp_path / "file").mkdir()
    opened = Environment(tmp_path / "file", map_bytes=_MAP)
    yield opened
    opened.close()


def test_who_writes_back_to_back_lets_in_whoever_waits(
    file: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in turns: those that others had from when this one stood in line until it was let in."""
    monkeypatch.setattr(turn, "_PATIENCE_S", turn.WAIT_S)
    last = 0
    take = PlaceInLine._take

    def taking(self: PlaceInLine) -> int | None:
        nonlocal last
        found = take(self)
        last = file._env.info()["last_txnid"]
        return found

    monkeypatch.setattr(PlaceInLine, "_take", taking)
    busy = [ready(_BUSY, tmp_path / "file") for _ in range(3)]
    passed = []
    try:
        until(lambda: file._env.info()["last_txnid"] > 10)
        for _ in range(100):
            with file.write() as txn:
                passed.append(txn.raw.id() - last - 1)
    finally:
        for process in busy:
            kill(process)
    assert max(passed) > 0, "they have to be at work"
    # Each of them was writing, or stood in line before.
    assert max(passed) <= len(busy), passed


def test_threads_come_in_the_order_in_which_they_asked() -> None:
    line = ThreadLine()
    order: list[int] = []

    def come(number: int) -> None:
        assert line.acquire(30)
        order.append(number)
        line.release()

    assert line.acquire(0)
    threads = [threading.Thread(target=come, args=(number,)) for number in range(8)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda number=number: len(line._waiting) > number)
    assert not line.acquire(0), "it is taken"
    line.release()
    assert line.acquire(30), "the last in line"
    line.release()
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    assert line.acquire(0)


def test_whoever_writes_is_told_that_another_process_or_thread_waits(
    file: Environment, tmp_path: Path
) -> None:
    with file.write():
        assert not file.is_wanted()
        process = ready(_WAITING, tmp_path / "file" / "queue")
        assert file.is_wanted()
        kill(process)
        assert not file.is_wanted()
        thread = threading.Thread(target=_write, args=[file])
        thread.start()
        until(file.is_wanted)
    thread.join()
    assert not file.is_wanted()


def _write(file: Environment) -> None:
    with file.write() as txn:
        txn.raw.put(b"a", b"b")


def test_who_is_interrupted_in_line_hands_on_what_he_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.given = False

        def acquire(self, timeout: float = 0) -> bool:
            if timeout:
                if self.given:
                    line.release()
                raise KeyboardInterrupt
            return True

        def release(self) -> None: ...

    line = ThreadLine()
    assert line.acquire(0)
    for given in (False, True):
        waiter = Interrupted()
        waiter.given = given
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Lock", lambda waiter=waiter: waiter)
            with pytest.raises(KeyboardInterrupt):
                line.acquire(30)
        assert not line._waiting
    assert not line._taken


def test_a_line_of_processes_closes_up_when_one_dies(tmp_path: Path) -> None:
    line = ProcessLine(tmp_path / "queue")
    first, second = (ready(_WAITING, tmp_path / "queue") for _ in range(2))
    try:
        with line.standing() as place:
            assert not place.is_first()
            kill(first)
            assert not place.is_first()
            kill(second)
            assert place.is_first()
        with line.standing() as place:
            assert place.is_first(), "and begins anew"
    finally:
        line.close()
        for process in (first, second):
            if process.poll() is None:
                kill(process)
    assert (tmp_path / "queue").stat().st_size == 0


def test_who_is_stopped_in_line_stops_nobody_for_long(
    file: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "_PATIENCE_S", 0.01)
    stopped = ready(_WAITING, tmp_path / "file" / "queue")
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        with file.write() as txn:
            txn.raw.put(b"a", b"b")
    finally:
        kill(stopped)


def test_a_lock_that_the_kernel_refuses_is_an_error_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "none left")

    mine = turn.Turn(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(EngineError, match=str(tmp_path)), mine.taken():
            pass
    with mine.taken():
        pass
    mine.close()
