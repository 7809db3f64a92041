"""The OCI runtime that runs containers: which one works here, its commands, and what its errors mean.

Sync; safe from any thread. A command is a process of some milliseconds; each is given up after a time.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.errors import EngineError

__all__ = [
    "Execution",
    "Runtime",
    "RuntimeState",
    "delete",
    "exec_argv",
    "failure",
    "find_runtime",
    "kill",
    "run_argv",
    "state",
    "update",
]


class Runtime(msgspec.Struct, frozen=True):
    """A runtime that works here."""

    name: str
    """`crun` or `runc`."""
    path: str
    version: str


class RuntimeState(msgspec.Struct, frozen=True):
    """What a runtime knows of a container."""

    status: str
    """`creating`, `created`, `running`, `paused` or `stopped`."""
    pid: int = 0


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """A further command for a container that runs; what is empty is as for its first one."""

    args: Sequence[str]
    env: Sequence[str] = ()
    """`KEY=VALUE`, over what its first process was given."""
    cwd: str = ""
    uid: int | None = None
    gid: int | None = None
    groups: Sequence[int] = ()
    terminal: bool = False


def find_runtime(name: str | None = None) -> Runtime:
    """Return the runtime of a name or path, or else the first of crun and runc that works here.

    NotSupported, with why not, if none does. Asked once in a process.
    """
    raise NotImplementedError


def run_argv(
    runtime: Runtime, states: Path, container: str, *, terminal: bool = False
) -> tuple[str, ...]:
    """Return the command that starts a container, detached, from within its folder.

    `states` is where the runtime keeps what it knows (ROOT/runtime).
    """
    raise NotImplementedError


def exec_argv(
    runtime: Runtime, states: Path, container: str, execution: Execution, log: Path
) -> tuple[str, ...]:
    """Return the command that runs a further one in a container; its own errors go to the file `log`."""
    raise NotImplementedError


def state(runtime: Runtime, states: Path, container: str) -> RuntimeState | None:
    """Return what the runtime knows of a container; None if nothing."""
    raise NotImplementedError


def kill(runtime: Runtime, states: Path, container: str, signal: int) -> bool:
    """Send a signal to a container's first process; False if that does not run any more."""
    raise NotImplementedError


def delete(runtime: Runtime, states: Path, container: str) -> None:
    """Kill what runs in a container; remove the runtime's state and the cgroup. Nothing may be left."""
    raise NotImplementedError


def update(runtime: Runtime, states: Path, container: str, resources: bytes) -> None:
    """Change what a running container may use: `linux.resources` of a specification, as JSON."""
    raise NotImplementedError


def failure(command: Sequence[str], said: str) -> EngineError:
    """Return the error that stands for what a runtime said of a container that it could not start."""
    raise NotImplementedError
