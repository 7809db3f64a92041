"""Starts commands that a test will kill or interrupt, and waits for what is left of them.

Sync. A victim runs in a session of its own, so that its orphaned workers can be found and waited for.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.command import LAMINA, environment

__all__ = ["Victim", "kill", "ready", "until"]

_DEADLINE_S = 30.0


class Victim:
    """A command in a process of its own."""

    def __init__(self, root: Path, arguments: Sequence[str], failpoints: str = "") -> None:
        """Start it and return once it has opened `root`, or ended."""
        self._lock = str(root.absolute() / "lock")
        self.process = subprocess.Popen(
            [*LAMINA, "--root", str(root), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(failpoints),
        )
        until(lambda: self._has_lock() or self.process.poll() is not None)

    def _has_lock(self) -> bool:
        open_files = Path(f"/proc/{self.process.pid}/fd")
        try:
            return any(os.readlink(file) == self._lock for file in open_files.iterdir())
        except OSError:  # it ended, or closed a file meanwhile
            return False

    def kill(self) -> None:
        """Kill the command alone; its workers have to notice by themselves."""
        self.process.kill()

    def interrupt(self) -> None:
        """Press Ctrl-C: every process of a terminal's foreground gets it, workers too."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> tuple[int, str]:
        """Wait for the command, then for its orphans; return its exit code and its messages."""
        _, messages = self.process.communicate(timeout=_DEADLINE_S)
        until(lambda: not _session(self.process.pid))
        return self.process.returncode, messages


def ready(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that runs `code`, and wait until it says that it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process, or the one that `unshare` runs for it, and wait until it is gone."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    for pid in map(int, children.split() or [process.pid]):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def until(done: Callable[[], Any]) -> None:
    """Poll until `done` says so; fail after a deadline."""
    end = time.monotonic() + _DEADLINE_S
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def _session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # proc(5): after the name come state, ppid, pgrp, session.
            if int(fields[3]) == leader and fields[0] not in {b"Z", b"X"}:
                found.append(int(entry.name))
    return found
