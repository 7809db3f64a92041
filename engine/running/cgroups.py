"""The cgroup of a container, `/lamina-UNIQUE`: what it uses, and its removal.

For version 1, 2, and both at once (hybrid). Sync; safe from any thread. Light: the monitor imports it.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from engine.errors import Unavailable, os_errors
from engine.limits import CGROUP_EMPTY_S

__all__ = [
    "Consumption",
    "Layout",
    "consumption",
    "exists",
    "kill_all",
    "layout",
    "name_of",
    "remove",
    "was_oom_killed",
]

_ROOT = "/sys/fs/cgroup"
_LARGEST = 64 * 1024  # of a file read; `io.stat` has a line for each disk
_UNLIMITED = 1 << 62  # version 1 says that memory has no limit by one beyond that
_POLL_S = 0.001


class Layout(Enum):
    """How a host has its cgroups."""

    UNIFIED = "cgroup v2"
    HYBRID = "cgroup v1 and v2 (hybrid)"
    LEGACY = "cgroup v1"
    NONE = "no cgroups"


class Consumption(NamedTuple):
    """What a container uses; None is what this kernel does not tell."""

    memory: int | None = None
    """Bytes, with what it has in the page cache."""
    memory_peak: int | None = None
    memory_limit: int | None = None
    cpu_ns: int | None = None
    pids: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


def layout() -> Layout:
    """Return how this host has its cgroups."""
    if os.path.exists(f"{_ROOT}/cgroup.controllers"):
        return Layout.UNIFIED
    if os.path.exists(f"{_ROOT}/unified/cgroup.controllers"):
        return Layout.HYBRID
    return Layout.LEGACY if os.path.isdir(f"{_ROOT}/memory") else Layout.NONE


def name_of(unique: str) -> str:
    """Return what a container's specification has as its `cgroupsPath`."""
    return f"/lamina-{unique}"


def exists(unique: str) -> bool:
    """Say whether a container has a cgroup."""
    return bool(_folders(unique))


def consumption(unique: str) -> Consumption | None:
    """Return what a container uses; None if it has no cgroup."""
    folders = _folders(unique)
    if not folders:
        return None
    if layout() is Layout.UNIFIED:
        return _unified(folders[0])
    return _legacy(unique)


def _unified(folder: str) -> Consumption:
    cpu = _fields(_read(f"{folder}/cpu.stat"), " ")
    io = [_fields(line.replace(" ", "\n"), "=") for line in _read(f"{folder}/io.stat").splitlines()]
    return Consumption(
        memory=_number(f"{folder}/memory.current"),
        memory_peak=_number(f"{folder}/memory.peak"),
        memory_limit=_number(f"{folder}/memory.max"),
        cpu_ns=1000 * cpu["usage_usec"] if "usage_usec" in cpu else None,
        pids=_number(f"{folder}/pids.current"),
        read_bytes=sum(disk.get("rbytes", 0) for disk in io) if io else None,
        written_bytes=sum(disk.get("wbytes", 0) for disk in io) if io else None,
    )


def _legacy(unique: str) -> Consumption:
    def at(controller: str, name: str) -> str:
        return f"{_ROOT}/{controller}{name_of(unique)}/{name}"

    limit = _number(at("memory", "memory.limit_in_bytes"))
    moved = _read(at("blkio", "blkio.throttle.io_service_bytes")).splitlines()
    parts = [line.split() for line in moved]
    by_kind = {
        kind: sum(int(part[2]) for part in parts if len(part) == 3 and part[1] == kind)
        for kind in ("Read", "Write")
    }
    return Consumption(
        memory=_number(at("memory", "memory.usage_in_bytes")),
        memory_peak=_number(at("memory", "memory.max_usage_in_bytes")),
        memory_limit=None if limit is None or limit > _UNLIMITED else limit,
        cpu_ns=_number(at("cpuacct", "cpuacct.usage")),
        pids=_number(at("pids", "pids.current")),
        read_bytes=by_kind["Read"] if parts else None,
        written_bytes=by_kind["Write"] if parts else None,
    )


def was_oom_killed(unique: str) -> bool:
    """Say whether something in a container was killed because its memory did not suffice."""
    name = name_of(unique)
    for file in (f"{_ROOT}{name}/memory.events", f"{_ROOT}/memory{name}/memory.oom_control"):
        if _fields(_read(file), " ").get("oom_kill", 0):
            return True
    return False


def kill_all(unique: str) -> None:
    """Kill all processes of a container; return when its cgroup is empty. Unavailable if it is not."""
    end = time.monotonic() + CGROUP_EMPTY_S
    while pids := _processes(unique):
        for pid in pids:
            _kill(pid, name_of(unique))
        if time.monotonic() > end:
            raise Unavailable(f"container {unique}: process {min(pids)} was killed but does not end")
        time.sleep(_POLL_S)


def _kill(pid: int, name: str) -> None:
    """Kill a process if it is still in a cgroup of that name."""
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            groups = _read(f"/proc/{pid}/cgroup").splitlines()
            if any(
                f"{group.partition(':')[2].partition(':')[2]}/".startswith(f"{name}/")
                for group in groups
            ):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def remove(unique: str) -> None:
    """Remove a container's cgroup, of all controllers; processes in it are killed first. Unavailable."""
    end = time.monotonic() + CGROUP_EMPTY_S
    with os_errors(f"cgroup {name_of(unique)}"):
        while folders := _folders(unique):
            kill_all(unique)
            try:
                for folder in folders:
                    _remove(folder)
            except OSError as error:
                # It lists no process, and yet is busy with one for a moment.
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)


def _remove(folder: str) -> None:
    for below in reversed(list(_walk(folder))):
        with suppress(FileNotFoundError):
            os.rmdir(below)


def _processes(unique: str) -> set[int]:
    """Return the processes in a container's cgroups and in those below."""
    found: set[int] = set()
    for folder in _folders(unique):
        for below in _walk(folder):
            found.update(map(int, _read(f"{below}/cgroup.procs").split()))
    return found - {0}


def _folders(unique: str) -> list[str]:
    """Return the folders of a container's cgroup, one for each hierarchy that has it."""
    name = name_of(unique)
    roots = [_ROOT]
    if layout() is not Layout.UNIFIED:
        with suppress(OSError), os.scandir(_ROOT) as entries:
            # The links among them (`cpu`) lead to others (`cpu,cpuacct`).
            roots = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [root + name for root in roots if os.path.isdir(root + name)]


def _walk(folder: str) -> Iterator[str]:
    """Iterate over a cgroup and those below, the upper ones first."""
    yield folder
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)


def _number(file: str) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdigit() else None  # `max` is no limit


def _fields(text: str, between: str) -> dict[str, int]:
    """Return the lines of a file that are a name and a number."""
    parts = (line.partition(between) for line in text.splitlines())
    return {name: int(value) for name, _, value in parts if value.isdigit()}


def _read(file: str) -> str:
    """Return the beginning of a file of the kernel's; nothing if there is none, or it ends meanwhile."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        pieces = b""
        while len(pieces) < _LARGEST and (piece := os.read(opened, _LARGEST)):
            pieces += piece
        return pieces.decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(opened)
