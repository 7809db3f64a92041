"""What provisioning gives: values.

Sync (records read the clock).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.kv.schema import Container
from engine.mount import Mount

__all__ = ["Provisioned", "Recovered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    """The root file system of a container, mounted."""

    container: Container
    folder: Path
    """All that there is of the container, for whoever runs it: `ROOT/containers/UNIQUE`."""
    rootfs: Path
    config: bytes
    """The image's config, as it is stored."""
    volumes: Mapping[str, Path]
    """Where the images are mounted, read-only, that it has as volumes, by the path in it."""
    grows: Sequence[Path]
    """The folders that grow with what it writes."""
    mounts: Sequence[Mount]
    """What is mounted at `rootfs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What became of each container, by its ID."""

    kept: Sequence[str] = ()
    destroyed: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why one could be neither kept nor destroyed."""
