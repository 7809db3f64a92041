"""Folders of containers, as the engine makes them, with the least specification that runs.

Sync.
"""

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from engine.running import cgroups
from engine.running.attaching import Attachment, Channel, ended
from engine.running.jobs import Launch
from engine.running.monitors import Begun, open_monitors
from engine.running.outcome import Outcome
from engine.running.runc import Runtime, delete, run_argv
from tests.processes import until

__all__ = ["Bundle", "bundle_in", "connected", "output", "read_until", "run", "shell"]

CAPABILITIES = ["CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]
NAMESPACES = ("pid", "mount", "ipc", "uts", "network")


@dataclass(frozen=True)
class Bundle:
    """The folder of a container, and how to start it."""

    folder: Path
    states: Path
    runtime: Runtime
    launch: Launch

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def monitor(self) -> int:
        """The pid of its monitor."""
        return int((self.folder / "monitor").read_text(encoding="ascii").split()[0])

    @property
    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()

    def attached(self) -> int:
        """Return how many connections its monitor has beside that which listens."""
        found = -1
        for file in Path(f"/proc/{self.monitor}/fd").iterdir():
            with suppress(FileNotFoundError):  # it is closed just now
                found += os.readlink(file).startswith("socket:")
        return found

    def is_still(self) -> bool:
        """Say whether its container writes no more: it waits."""
        try:
            before = (self.folder / "log").stat()
            time.sleep(0.05)
            after = (self.folder / "log").stat()
        except FileNotFoundError:  # it is not begun yet, or is just being turned
            return False
        return after.st_size > 0 and (before.st_size, before.st_ino) == (after.st_size, after.st_ino)

    def running(self) -> list[int]:
        """Return the processes whose work is in its folder, or in its cgroup: monitor and container."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    in_group = cgroups.name_of(self.id) in (entry / "cgroup").read_text(encoding="ascii")
                    is_ours = in_group or (entry / "cwd").readlink() == self.folder
                    is_dead = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0] in {
                        b"Z",
                        b"X",
                    }
                except OSError:
                    continue
                if is_ours and not is_dead:
                    found.append(int(entry.name))
        return found

    def delete(self) -> None:
        delete(self.runtime, self.states, self.id)

    def tidy(self) -> str:
        """Remove what is left of it; say what that was."""
        try:
            until(lambda: not self.running())  # a monitor ends after it has told all
        except AssertionError:
            pass
        running = self.running()
        left = f"processes {running}" if running else ""
        for pid in running:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if cgroups.consumption(self.id) or (self.states / self.id).exists():
            left += " its cgroup, or the runtime's state"
            self.delete()
        return left and f"{self.id}: {left}"


def bundle_in(
    parent: Path,
    rootfs: Path,
    runtime: Runtime,
    args: Sequence[str],
    *,
    terminal: bool = False,
    memory: int = 0,
    cwd: str = "/",
    size: tuple[int, int] | None = None,
    uid: int = 0,
    below: str = "containers",
    mounts: Sequence[dict[str, Any]] = (),
    **launched: Any,
) -> Bundle:
    """Make the folder of a container that runs `args`."""
    unique = secrets.token_hex(8)
    folder = parent / below / unique
    folder.mkdir(parents=True, mode=0o700)
    process = {
        "terminal": terminal,
        "user": {"uid": uid, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "HERE=yes"],
        "cwd": cwd,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        "noNewPrivileges": True,
    }
    if size:
        process["consoleSize"] = {"height": size[0], "width": size[1]}
    spec = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(rootfs), "readonly": True},
        "hostname": "here",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620"],
            },
            *mounts,
        ],
        "linux": {
            "cgroupsPath": cgroups.name_of(unique),
            "namespaces": [{"type": name} for name in NAMESPACES],
            "resources": {"memory": {"limit": memory}} if memory else {},
        },
    }
    (folder / "config.json").write_text(json.dumps(spec))
    states = parent / "runtime"
    launch = Launch(
        str(folder), unique, run_argv(runtime, states, unique, terminal=terminal), terminal, **launched
    )
    return Bundle(folder, states, runtime, launch)


def connected(one: Bundle) -> socket.socket:
    """Return a connection to a monitor, without a client's manners."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    folder = os.open(one.folder, os.O_PATH)  # its path may be too long
    try:
        connection.connect(f"/proc/self/fd/{folder}/attach")
    finally:
        os.close(folder)
    return connection


def shell(script: str) -> tuple[str, ...]:
    """Return a command that runs a script."""
    return ("/bin/sh", "-c", script)


def output(told: Sequence[tuple[Channel, bytes]], channel: Channel = Channel.STDOUT) -> bytes:
    """Return what was written to one channel."""
    return b"".join(data for where, data in told if where == channel)


async def read_until(attachment: Attachment, wanted: bytes) -> bytes:
    """Return what a container writes, until `wanted` is in it."""
    told = b""
    with trio.fail_after(30):
        while wanted not in told:
            _, data = await anext(attachment)
            told += data
    return told


def run(
    one: Bundle,
    then: Callable[[Begun], Awaitable[tuple[list[tuple[Channel, bytes]], Outcome | None]]] | None = None,
    **changes: Any,
) -> tuple[list[tuple[Channel, bytes]], Outcome]:
    """Start a container and wait for its end; return what it wrote, if attached, and how it ended."""

    async def main() -> tuple[list[tuple[Channel, bytes]], Outcome]:
        told: list[tuple[Channel, bytes]] = []
        async with open_monitors() as monitors:
            begun = await monitors.start(one.launch._replace(**changes))
            if then:
                told, _ = await then(begun)
            elif begun.attachment:
                told = [piece async for piece in begun.attachment]
            if begun.attachment:
                await begun.attachment.aclose()
        return told, await ended(one.folder)

    return trio.run(main)
