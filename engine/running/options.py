"""What a container is to run, and how: what whoever asks for it decides.

Pure. Values only; what the image says is in `engine.oci.execution`, and `engine.running.bundle` makes
the one specification of both that a runtime reads.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

__all__ = ["Bind", "ExecOptions", "IDMap", "Network", "Resources", "RunOptions"]


class Network(StrEnum):
    """What network a container has."""

    NONE = "none"
    """One of its own, with nothing but a loopback interface."""
    HOST = "host"
    """The host's, with its names (`/etc/resolv.conf`, `/etc/hosts`)."""


class Bind(msgspec.Struct, frozen=True, kw_only=True):
    """A file or folder of the host's that a container has at `target`."""

    source: str
    target: str
    readonly: bool = False


class IDMap(msgspec.Struct, frozen=True, kw_only=True):
    """User and group IDs of a container, from `inside` on, as the host has them, from `outside` on."""

    inside: int
    outside: int
    size: int


class Resources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a container may use; 0 is whatever there is."""

    memory: int = 0
    """Bytes."""
    cpus: float = 0
    pids: int = 0


class RunOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to run a container; what is None or empty is as the image says."""

    args: Sequence[str] = ()
    """In place of the image's command, after its entrypoint."""
    entrypoint: Sequence[str] | None = None
    """In place of the image's entrypoint, whose command then does not count; empty for none."""
    env: Sequence[str] = ()
    """`KEY=VALUE`, over what the image says."""
    cwd: str = ""
    user: str = ""
    """`USER[:GROUP]`, by name or number."""
    hostname: str = ""
    terminal: bool = False
    terminal_size: tuple[int, int] | None = None
    """Rows and columns that it has at first."""
    stdin: bool = False
    """Whether somebody may write to its standard input; else that is empty."""
    readonly: bool = False
    binds: Sequence[Bind] = ()
    network: Network = Network.NONE
    resources: Resources = Resources()
    id_maps: Sequence[IDMap] = ()
    rootless: bool = False
    stop_signal: str = ""
    labels: dict[str, str] = {}


class ExecOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A further command for a container that runs; what is empty is as for its first one."""

    args: Sequence[str]
    env: Sequence[str] = ()
    """`KEY=VALUE`, over what its first process was given."""
    cwd: str = ""
    user: str = ""
    """`USER[:GROUP]`, by name or number."""
    terminal: bool = False
