"""Processes that are accounted together, however they part: a control group (version 2) of their own.

Their time on a processor is the kernel's own account of the group (`cpu.stat`), which also holds what
has ended, a daemon and its shims. Memory is read from /proc for every process in it, again and again:
the kernel's peak of a group (`memory.peak`) would count all files that were written.
"""

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.costs import Cost
from benchmarks.fresh import prefix, unmount

__all__ = ["Command", "Failed", "Group", "Step", "group"]

_BETWEEN_LOOKS = 0.02
_ENDING_S = 10.0

Command = Sequence[str]
Step = Sequence[Command]
"""Commands at once, each with the output of the one before."""


class Failed(Exception):
    """A command of a contender failed; the message is the last that it wrote."""


@dataclass
class Group:
    """A control group, and the file that gets what is written in it."""

    folder: Path
    messages: Path

    def start(
        self, command: Command, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a command in the group."""
        entering = ("sh", "-c", 'echo 0 >"$0" && exec "$@"', str(self.folder / "cgroup.procs"))
        with self.messages.open("ab") as messages:
            return subprocess.Popen([*entering, *command], stdin=stdin, stdout=stdout, stderr=messages)

    def run(self, *steps: Step) -> None:
        """Run steps one after the other. Failed if a command of them did."""
        for step in steps:
            started: list[subprocess.Popen[bytes]] = []
            before = subprocess.DEVNULL
            for command in step:
                is_last = command is step[-1]
                after = subprocess.DEVNULL if is_last else subprocess.PIPE
                process = self.start(command, stdin=before, stdout=after)
                if started and (pipe := started[-1].stdout):
                    pipe.close()  # or the end of who reads it would not end who writes it
                before = process.stdout.fileno() if process.stdout else subprocess.DEVNULL
                started.append(process)
            for command, process in zip(step, started, strict=True):
                if process.wait():
                    raise Failed(f"{command[0]}: exit code {process.returncode}: {self._last_words()}")

    def timed(self, *steps: Step) -> Cost:
        """Run steps and return what they took, and whoever else is in the group meanwhile."""
        peaks = _Peaks(self.folder)
        user, system = self.busy()
        start = time.perf_counter()
        with peaks.watched():
            self.run(*steps)
            seconds = time.perf_counter() - start
        user_after, system_after = self.busy()
        return Cost(seconds, user_after - user, system_after - system, peaks.own, peaks.mapped)

    def end(self) -> None:
        """Kill whoever is left."""
        (self.folder / "cgroup.kill").write_text("1")
        end = time.monotonic() + _ENDING_S
        while "populated 1" in (self.folder / "cgroup.events").read_text() and time.monotonic() < end:
            time.sleep(0.01)

    def busy(self) -> tuple[float, float]:
        """Return seconds as a user and in the kernel, of all who were ever in the group."""
        lines = (self.folder / "cpu.stat").read_text().splitlines()
        spent = {key: int(value) / 1e6 for key, value in (line.split() for line in lines)}
        return spent["user_usec"], spent["system_usec"]

    def _last_words(self) -> str:
        lines = self.messages.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


class _Peaks:
    """The most memory that the processes of a group had at once."""

    def __init__(self, folder: Path) -> None:
        self.own = self.mapped = 0
        self._folder = folder
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look again and again for the length of a block."""
        looking = threading.Thread(target=self._look)
        looking.start()
        try:
            yield
        finally:
            self._over.set()
            looking.join()

    def _look(self) -> None:
        while not self._over.wait(_BETWEEN_LOOKS):
            own = mapped = 0
            for pid in (self._folder / "cgroup.procs").read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):  # it ended
                    status = Path(f"/proc/{pid}/status").read_text()
                    kilobytes = {key: int(value) for key, value in _RSS.findall(status)}
                    own += kilobytes.get("Anon", 0) + kilobytes.get("Shmem", 0)
                    mapped += kilobytes.get("File", 0)
            self.own = max(self.own, own * 1024)
            self.mapped = max(self.mapped, (own + mapped) * 1024)


_RSS = re.compile(r"^Rss(Anon|File|Shmem):\s+(\d+) kB$", re.MULTILINE)


@contextmanager
def group() -> Iterator[Group]:
    """Make a group for the length of a block; whoever is in it at the end is killed. Needs root."""
    with tempfile.TemporaryDirectory(prefix=prefix("group")) as holder:
        tree, messages = Path(holder) / "tree", Path(holder) / "messages"
        tree.mkdir()
        # A mount of our own: there may be none (old systems), or one that is read-only (containers).
        try:
            subprocess.run(["mount", "-t", "cgroup2", "none", str(tree)], check=True)
            found = Group(tree / _own_path() / Path(holder).name, messages)
            found.folder.mkdir()
            try:
                yield found
            finally:
                found.end()
                found.folder.rmdir()
        finally:
            unmount(tree)


def _own_path() -> str:
    """Return where this process is: what is below keeps to the bounds that it has."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), None)
    if path is None:
        sys.exit("the kernel has no control groups of version 2, which the accounting needs")
    return path
