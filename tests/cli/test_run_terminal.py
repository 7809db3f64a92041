"""`lamina run -it` on a real terminal: sizes, keys, and the terminal as it was in any case."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cli.container_places import Place
from tests.cli.failing import assert_one_line

pytestmark = pytest.mark.root

_DEADLINE_S = 30
_SIZE = "until busybox stty size 2>/dev/null; do :; done"  # the runtime sets it a little later


class Screen:
    """A terminal of its own session, with a command on it."""

    def __init__(self, place: Place, *words: object, rows: int = 30, columns: int = 100) -> None:
        self._leader, self._follower = pty.openpty()
        self.resize(rows, columns)
        self.before = self.modes()
        self.seen = b""
        follower = self._follower
        self.process: subprocess.Popen[bytes] = place.start(
            *words,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            preexec_fn=lambda: os.login_tty(os.dup(follower)),
        )

    def modes(self) -> list[object]:
        return termios.tcgetattr(self._follower)

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, size)

    def type(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def until(self, there: bytes | Callable[[], object], nudge: bytes = b"") -> None:
        """Read until something is there, and forget what came up to it; `nudge` is typed meanwhile."""
        end = time.monotonic() + _DEADLINE_S
        while not (there in self.seen if isinstance(there, bytes) else there()):
            assert time.monotonic() < end, self.seen
            if select.select([self._leader], [], [], 0.05)[0]:
                self.seen += os.read(self._leader, 1 << 16)
            elif nudge:
                self.type(nudge)
        if isinstance(there, bytes):
            self.seen = self.seen.partition(there)[2]

    def ended(self) -> int:
        """Wait until the command has ended; the terminal is as it was."""
        self.until(lambda: self.process.poll() is not None)
        self.until(lambda: not select.select([self._leader], [], [], 0)[0])
        assert self.modes() == self.before
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._follower)
        os.close(self._leader)
        self._leader = self._follower = -1

    def close(self) -> None:
        if self._leader >= 0:
            self.hang_up()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def screen(place: Place) -> Iterator[Callable[..., Screen]]:
    """Start commands on terminals."""
    made: list[Screen] = []

    def make(*words: object) -> Screen:
        made.append(Screen(place, *words))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_shell_on_a_terminal(place: Place, screen: Callable[..., Screen]):
    shell = screen("run", "--rm", "-it", "busybox", "sh", "-c", "busybox stty size; echo up; exec sh")
    shell.until(b"30 100")
    shell.until(b"up\r\n")
    assert shell.modes() != shell.before
    shell.type(b"echo a$((1 + 1))b; test -t 0 && test -t 1 && echo is a term''inal\r")
    shell.until(b"a2b")
    shell.until(b"is a terminal")
    shell.type(b"exit 3\r")
    assert shell.ended() == 3
    assert place.listed() == {}


def test_a_new_size_is_told(place: Place, screen: Callable[..., Screen]):
    script = "trap 'busybox stty size' WINCH; echo up; while :; do sleep 0.05; done"
    shell = screen("run", "--rm", "--name", "w", "-it", "busybox", "sh", "-c", script)
    shell.until(b"up\r\n")
    shell.resize(40, 120)
    shell.until(b"40 120")
    place("kill", "w")
    assert shell.ended() == 137


def test_ctrl_c_is_typed_and_ends_what_runs_in_it(screen: Callable[..., Screen]):
    shell = screen("run", "--rm", "-it", "busybox", "sh")
    shell.type(b"sh -c 'echo be\"\"fore; exec sleep 1000'\r")
    shell.until(b"before\r\n")
    shell.type(b"\x03")
    shell.until(b"^C\r\n/ # ")  # what is typed before that is dropped
    shell.type(b"echo after $?\r")
    shell.until(b"after 130")
    shell.type(b"\x04")  # Ctrl-D
    assert shell.ended() == 0


def test_the_keys_that_leave_it(place: Place, screen: Callable[..., Screen]):
    shell = screen("run", "--name", "left", "-it", "busybox", "sh", "-c", "echo up; exec cat")
    shell.until(b"up")
    shell.type(b"\x10\x11")
    assert shell.ended() == 0
    assert place.listed()["left"]["state"] == "running"
    again = screen("attach", "left")
    again.type(b"typed\r")
    again.until(b"typed\r\ntyped\r\n")
    again.type(b"\x04")
    assert again.ended() == 0
    place.until_state("left", "stopped")


def test_a_terminal_that_is_closed_hangs_up(place: Place, screen: Callable[..., Screen]):
    script = "trap 'exit 9' HUP; echo up; while :; do sleep 0.05; done"
    kept = screen("run", "--name", "kept", "-it", "busybox", "sh", "-c", script)
    gone = screen("run", "--name", "gone", "--rm", "-it", "busybox", "sh", "-c", script)
    for one in (kept, gone):
        one.until(b"up")
        one.hang_up()
        one.process.wait(_DEADLINE_S)
    place.until_state("kept", "stopped")
    assert place.listed()["kept"]["exit_code"] == 9
    place.until_gone("gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_as_it_was_after_a_signal(number: int, screen: Callable[..., Screen]):
    shell = screen(
        "run", "--rm", "-it", "busybox", "sh", "-c", "trap 'exit 4' TERM HUP; echo up; read x"
    )
    shell.until(b"up")
    shell.process.send_signal(number)
    assert shell.ended() == 4


def test_exec_on_a_terminal(place: Place, screen: Callable[..., Screen]):
    """runc 1.1 has the terminal then; it may show something only once something more comes."""
    place("run", "-d", "--name", "web", "busybox", "sleep", "1000")
    script = f'{_SIZE}; while read x; [ "$x" != this ]; do :; done; echo got $x; exit 5'
    shell = screen("exec", "-it", "web", "sh", "-c", script)
    shell.until(b"30 100", nudge=b"\r")
    shell.type(b"this\r")
    shell.until(b"got this", nudge=b"\r")
    assert shell.ended() == 5


def test_without_a_terminal_there_is_none_to_give(place: Place):
    for words in (("run", "-it", "busybox"), ("exec", "-it", "web", "sh")):
        done = place(*words, code=2)
        assert_one_line(done.stderr, "-t with -i: standard input is no terminal")
    done = place("run", "--rm", "-t", "busybox", "sh", "-c", "test -t 1 && echo is one")
    assert done.stdout == "is one\n"  # as \\r\\n, which reading as text makes one
