"""The OCI runtime that runs containers: which one works here, its commands, and what its errors mean.

Sync; safe from any thread. A command is a process of some milliseconds; each is given up after a time.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from engine.errors import (
    CommandFailed,
    EngineError,
    FailedPrecondition,
    NotSupported,
    PermissionDenied,
    Unavailable,
    os_errors,
    printable,
)
from engine.limits import RUNTIME_S
from engine.running.cgroups import Layout, exists, layout, remove
from engine.running.jobs import ENVIRONMENT, PATH
from engine.running.runtime_log import RUNTIME_LOG

__all__ = [
    "Runtime",
    "RuntimeState",
    "delete",
    "exec_argv",
    "exec_failure",
    "failure",
    "find_runtime",
    "kill",
    "run_argv",
    "state",
    "update",
]

_log = logging.getLogger(__name__)

_NAMES = ("crun", "runc")

_VERSION = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?(\S*)")
_GONE = ("does not exist", "not running", "already finished", "no such process", "no such file")
# What runc and crun say of a command, in any case of letters.
_NOT_FOUND = re.compile(r"executable file .*not found|exec.*: no such file or directory")
_NOT_EXECUTABLE = re.compile(
    r"exec.*: (permission denied|is a directory|exec format error|not a directory)"
)


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


@cache
def find_runtime(name: str | None = None) -> Runtime:
    """Return the runtime of a name or path, or else the first of crun and runc that works here.

    NotSupported, with why not, if none does. Asked once in a process.
    """
    why: list[str] = []
    for one in (name,) if name else _NAMES:
        try:
            runtime = _probed(one)
        except NotSupported as error:
            why.append(str(error))
        else:
            _warn_of(runtime)
            return runtime
    raise NotSupported(
        f"no container can be run: {'; '.join(why)}; install runc 1.3.3 or later, or crun"
    )


def _probed(name: str) -> Runtime:
    """Return a runtime if it works here. NotSupported."""
    path = shutil.which(name, path=PATH)
    if path is None:
        raise NotSupported(f"{name} is not installed")
    try:
        said = subprocess.run(
            [path, "--version"],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=RUNTIME_S,
            check=True,
        ).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise NotSupported(f"{path} does not run ({error})") from error
    kind = said.partition(" ")[0]
    version = _VERSION.search(said)
    if kind not in _NAMES or version is None:
        raise NotSupported(f"{path} is neither runc nor crun")
    if kind == "crun" and layout() is Layout.HYBRID:
        # "cgroups in hybrid mode not supported" is all that it says then, of any container.
        raise NotSupported(f"crun refuses hosts with {Layout.HYBRID.value}")
    return Runtime(kind, path, version[0].removeprefix("version "))


def _warn_of(runtime: Runtime) -> None:
    """Warn of a runc out of which a container can break."""
    # CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881.
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", runtime.version)
    number = tuple(int(part or 0) for part in found.groups()) if found else ()
    is_mended = number >= (1, 3, 3) or (1, 2, 8) <= number < (1, 3)
    if runtime.name == "runc" and not is_mended:
        _log.warning(
            "runc %s lets hostile images out of containers, unless your distribution has mended it "
            "(CVE-2025-31133); install 1.2.8, 1.3.3 or later",
            runtime.version,
        )


def run_argv(runtime: Runtime, states: Path, unique: str, *, terminal: bool = False) -> tuple[str, ...]:
    """Return the command that starts a container, detached, from within its folder.

    `states` is where the runtime keeps what it knows (ROOT/runtime).
    """
    logged = ("--log", RUNTIME_LOG, "--log-format", "json")
    console = ("--console-socket", "console") if terminal else ()
    rest = ("run", "--detach", "--pid-file", "pid", *console, unique)
    return (runtime.path, "--root", str(states), *logged, *rest)


def exec_argv(runtime: Runtime, states: Path, unique: str, process: Path, log: Path) -> tuple[str, ...]:
    """Return the command that runs a further process in a container, which the file `process` describes.

    Its own errors go to the file `log`.
    """
    logged = ("--log", str(log), "--log-format", "json")
    told = ("--process", str(process))
    return (runtime.path, "--root", str(states), *logged, "exec", *told, unique)


def state(runtime: Runtime, states: Path, unique: str) -> RuntimeState | None:
    """Return what the runtime knows of a container; None if nothing."""
    done = _done(runtime, states, "state", unique)
    if done.returncode == 0:
        try:
            return msgspec.json.decode(done.stdout, type=RuntimeState)
        except msgspec.DecodeError as error:
            raise EngineError(f"{runtime.path}: what it tells cannot be read: {error}") from error
    if _says(done, _GONE):
        return None
    raise _error(done)


def kill(runtime: Runtime, states: Path, unique: str, signal: int) -> bool:
    """Send a signal to a container's first process; False if that does not run any more."""
    done = _done(runtime, states, "kill", unique, str(signal))
    if done.returncode and not _says(done, _GONE):
        raise _error(done)
    return done.returncode == 0


def delete(runtime: Runtime, states: Path, unique: str) -> None:
    """Kill what runs in a container; remove the runtime's state and the cgroup. Nothing may be left."""
    if exists(unique):
        # All that it ran is in there. What else a runtime does is the same, but takes a process of 4 ms,
        # and looks ten times a second whether what it killed has ended.
        remove(unique)
        with os_errors(str(states)), suppress(FileNotFoundError):
            shutil.rmtree(states / unique)
    elif (states / unique).exists():
        done = _done(runtime, states, "delete", "--force", unique)
        if done.returncode and not _says(done, _GONE):
            raise _error(done)


def update(runtime: Runtime, states: Path, unique: str, resources: bytes) -> None:
    """Change what a running container may use: `linux.resources` of a specification, as JSON."""
    done = _done(runtime, states, "update", "--resources", "/dev/stdin", unique, given=resources)
    if done.returncode:
        raise _error(done)


def _done(
    runtime: Runtime, states: Path, *command: str, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the runtime to its end."""
    argv = [runtime.path, "--root", str(states), *command]
    try:
        with os_errors(runtime.path):
            return subprocess.run(
                argv, input=given, env=ENVIRONMENT, capture_output=True, timeout=RUNTIME_S, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{runtime.name} {command[0]} does not end; try again") from error


def _says(done: subprocess.CompletedProcess[bytes], words: Sequence[str]) -> bool:
    text = done.stderr.decode("utf-8", "replace").lower()
    return any(word in text for word in words)


def _error(done: subprocess.CompletedProcess[bytes]) -> EngineError:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return failure(lines[-1] if lines else f"it ended with status {done.returncode}")


def failure(said: str) -> EngineError:
    """Return the error that stands for what a runtime said of a container that it could not start."""
    text = said.lower()
    message = f"the container's command cannot be run: {printable(said, 400)}"
    if _NOT_FOUND.search(text):
        return CommandFailed(message, 127)
    if _NOT_EXECUTABLE.search(text):
        return CommandFailed(message, 126)
    kind = PermissionDenied if "operation not permitted" in text else EngineError
    return kind(f"the runtime could not start the container: {printable(said, 400)}")


def exec_failure(said: str) -> EngineError:
    """Return the error that stands for what a runtime said of a further command."""
    if any(word in said.lower() for word in ("does not exist", "not running", "stopped container")):
        return FailedPrecondition("the container does not run; `lamina ps` lists those that do")
    return failure(said)
