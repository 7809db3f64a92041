"""What is told of containers: values.

Pure. Times are nanoseconds since the epoch.
"""

from collections.abc import Mapping, Sequence

import msgspec

from engine.metadata.containers import ContainerState
from engine.running.attaching import Attachment
from engine.running.cgroups import Consumption
from engine.snapshots import Usage

__all__ = ["ContainerStatus", "ContainerUsage", "Ended", "Failure", "Launched", "RecoveredContainers"]


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A container as it is at one moment."""

    id: str
    unique: str
    """What its folder, its cgroup and the runtime's container are called."""
    state: ContainerState
    since: Mapping[str, int]
    """When it last entered each state."""
    created: int
    image: str
    """Its name, in full."""
    target: str
    """What that meant then, by digest."""
    backend: str
    command: Sequence[str] = ()
    """What it runs in the end, of its image and its options; empty before it is prepared."""
    parent: str = ""
    labels: Mapping[str, str] = {}
    pid: int = 0
    """Of its first process, in the engine's pid namespace; 0 if that does not run."""
    exit_code: int | None = None
    """128 + n for signal n. None while it runs, and for a stopped one if nobody could see its end."""
    ended: int = 0
    errors: int = 0
    error: str = ""
    """How often destroying it failed, and why the last time."""


class Ended(msgspec.Struct, frozen=True):
    """How and when the first process of a container ended."""

    code: int | None
    """128 + n for signal n; None if nobody could see it: its monitor was killed, or the machine was."""
    at: int


class Launched(msgspec.Struct, frozen=True, kw_only=True):
    """A container that was asked for."""

    status: ContainerStatus
    already: bool = False
    """Whether it was there."""
    attachment: Attachment | None = None
    """The caller's connection to it, where he asked to be its first client: his to close."""


class ContainerUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a container takes up."""

    disk: Mapping[str, Usage]
    """Its own bytes and inodes, by where they are mounted in it."""
    consumed: Consumption | None
    """Memory, processor time and processes; None if it does not run."""


class Failure(msgspec.Struct, frozen=True):
    """A container that could not be recovered or destroyed, and why."""

    id: str
    error: str


class RecoveredContainers(msgspec.Struct, frozen=True):
    """What there was after a restart: what became of each container, by its ID."""

    running: Sequence[str] = ()
    stopped: Sequence[str] = ()
    """They ended meanwhile, or before."""
    provisioned: Sequence[str] = ()
    """They have all they need, and never began: `launch` goes on from there."""
    destroyed: Sequence[str] = ()
    failed: Sequence[Failure] = ()
