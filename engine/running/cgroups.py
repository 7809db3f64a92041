"""The cgroup of a container, `/lamina-<id>`: what it uses, and its removal.

For version 1, 2, and both at once (hybrid). Sync; safe from any thread. Light: the monitor imports it.
"""

from typing import NamedTuple

__all__ = ["Consumption", "consumption", "kill_all", "name_of", "remove", "was_oom_killed"]


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


def name_of(container: str) -> str:
    """Return what a container's specification has as its `cgroupsPath`."""
    return f"/lamina-{container}"


def consumption(container: str) -> Consumption | None:
    """Return what a container uses; None if it has no cgroup."""
    raise NotImplementedError


def was_oom_killed(container: str) -> bool:
    """Say whether something in a container was killed because its memory did not suffice."""
    raise NotImplementedError


def kill_all(container: str) -> None:
    """Kill all processes of a container; return when its cgroup is empty. Unavailable if it is not."""
    raise NotImplementedError


def remove(container: str) -> None:
    """Remove a container's cgroup, of all controllers; processes in it are killed first."""
    raise NotImplementedError
