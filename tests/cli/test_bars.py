"""Progress on a real terminal, on none, and on one that is closed: and nothing of it on stdout."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket

import pytest

from engine.cli import bars
from engine.cli.bars import progress
from engine.cli.output import View
from engine.progress import Step
from engine.testing.archives import archive, member
from engine.testing.fake_registry import Asked, FakeRegistry, Fault
from tests.command import LAMINA, environment
from tests.registry.asking import Served

pytestmark = pytest.mark.root

LAYERS = tuple(archive(member(f"file {number}", data=os.urandom(5000))) for number in range(30))


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().running() as running:
        yield running


@pytest.fixture
def served(registry: FakeRegistry) -> Served:
    return Served(registry, LAYERS)


def waiting(go_on: threading.Event) -> Fault:
    """Answer when the test says so, or after a while."""

    def fault(connection: socket, _asked: Asked, good: bytes) -> bool:
        go_on.wait(20)
        connection.sendall(good)
        return True

    return fault


class Terminal:
    """A pseudo terminal with a command on it, whose stdout is a pipe."""

    def __init__(self, *words: object, columns: int, term: str = "xterm") -> None:
        self._leader, follower = pty.openpty()
        self.resize(columns)
        # readline, which pytest loads, sets the size of its own terminal for all children.
        clean = {key: value for key, value in environment().items() if key not in {"COLUMNS", "LINES"}}
        self.process = subprocess.Popen(
            [*map(str, (*LAMINA, *words))],
            stdout=subprocess.PIPE,
            stderr=follower,
            stdin=subprocess.DEVNULL,
            env={**clean, "TERM": term, "LC_ALL": "C.UTF-8"},
        )
        os.close(follower)
        self.written = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def until(self, condition: Callable[[str], object]) -> None:
        """Read until it is so, or the command ends."""
        while not condition(self.written):
            assert select.select([self._leader], [], [], 20)[0], self.written
            try:
                self.written += self._decoder.decode(os.read(self._leader, 1 << 16))
            except OSError:  # EIO: nobody has the other end any more
                return

    def ended(self) -> bytes:
        assert self.process.stdout
        with self.process.stdout as pipe:
            out: bytes = pipe.read()
        self.until(lambda _text: False)
        assert self.process.wait() == 0, self.written
        os.close(self._leader)
        return out


def pulling(root: Path, served: Served, *words: object) -> tuple[object, ...]:
    options = ("--platform", "linux/amd64", "--snapshotter", "overlay")
    return ("--root", root, "pull", *options, *words, served.reference)


def plain(text: str) -> list[str]:
    """Return the lines of what was drawn, without what moves the cursor or colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("columns", [80, 40])
def test_a_pull_on_a_terminal_fits_and_leaves_one_line(
    columns: int, tmp_path: Path, served: Served, registry: FakeRegistry
) -> None:
    go_on = threading.Event()
    registry.plan(f"blobs/{served.layers[-1].digest}", waiting(go_on))
    terminal = Terminal(*pulling(tmp_path / "root", served, "--json"), columns=columns)
    terminal.until(lambda text: "29 of 30 layers done" in text)
    drawn = terminal.written
    terminal.resize(columns // 2)
    terminal.until(lambda text: len(text) > len(drawn) + 200)
    go_on.set()
    out = terminal.ended()
    assert json.loads(out)["images"]
    lines = plain(drawn)
    assert max(map(len, lines)) < columns
    assert any(re.match(r"[0-9a-f]{12} (waiting|done) ", line) for line in lines)
    assert re.search(r"^and \d+ more$", "\n".join(lines), re.MULTILINE)
    # The picture is no higher than the terminal: the cursor never goes up by more.
    assert drawn.count("\x1b[1A\x1b[2K" * 23) == 0
    assert max(map(len, plain(terminal.written[-200:]))) < columns // 2


def test_a_dumb_terminal_and_none_have_plain_lines(tmp_path: Path, served: Served) -> None:
    terminal = Terminal(*pulling(tmp_path / "root", served), columns=80, term="dumb")
    terminal.ended()
    assert re.fullmatch(r"pulled \S+ \([0-9a-f]{12}\)\r\n", terminal.written)


@pytest.mark.parametrize("where", ["closed", "full"])
def test_where_stderr_cannot_be_written(where: str, tmp_path: Path, served: Served) -> None:
    to = "2>&-" if where == "closed" else "2>/dev/full"
    words = [*map(str, (*LAMINA, *pulling(tmp_path / "root", served, "--json")))]
    command = ["sh", "-c", f'exec "$@" {to}', "sh", *words]
    done = subprocess.run(command, capture_output=True, env=environment(), check=True)
    assert json.loads(done.stdout)["images"]


def test_without_a_terminal_long_work_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = threading.Event()
    say = bars.say

    def saying(message: str) -> None:
        say(message)
        if "layers" in message:
            said.set()

    monkeypatch.setattr(bars, "_EVERY_S", 0.001)
    monkeypatch.setattr(bars, "say", saying)
    with progress(View()) as report:
        for _ in range(2):
            report(Step.WAIT, "process 7", 1, 0)
        report(Step.FETCH, "sha256:a", 1000, 0)
        report(Step.FETCH, "sha256:b", 1000, 500)
        assert said.wait(10)
    shown = capsys.readouterr().err.splitlines()
    assert shown.count("lamina: waiting: process 7") == 1
    says = "lamina: 0 of 2 layers done: 1 waiting/1 fetching, 500 B of 2.0 kB"
    assert any(line.startswith(says) for line in shown)
    with progress(View(quiet=True)) as report, progress(View(json=True)) as too:
        report(Step.WAIT, "process 7", 1, 0)
        too(Step.FETCH, "sha256:a", 1000, 0)
    assert not capsys.readouterr().err
    assert "progress" not in {thread.name for thread in threading.enumerate()}
