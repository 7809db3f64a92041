"""From what an image says and what whoever runs it wants to an OCI bundle: one specification.

Sync; safe from any thread. Everything that depends on what is in the root file system (users, the
working folder, mount points) is settled here, by descriptor, before a runtime sees it: what that is given
are numbers, and paths without a link on the way (`engine.provision.inside`).
"""

from pathlib import Path

import msgspec

from engine.oci.execution import Execution
from engine.oci.platform import Platform
from engine.oci.runtime_spec import LinuxResources, Spec
from engine.running.options import Resources, RunOptions

__all__ = ["Setting", "make_spec", "resource_limits", "stop_signal", "write_bundle"]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Where a container is to run."""

    unique: str
    """Names its cgroup, and its host if nothing else does."""
    rootfs: Path
    """Its root file system, mounted; a real path. Nothing else may write there meanwhile."""
    host: Platform
    parent: int = 0
    """A process whose network, host name and IPC it shares: that of the container it is nested in."""


def make_spec(execution: Execution, options: RunOptions, setting: Setting) -> Spec:
    """Return the specification of a container; make the folders and mount points that it lacks inside.

    Raises InvalidArgument for what the options want and cannot be (no command at all among it), NotFound
    for a bind's source that is not there, NotSupported for an image of another platform, and Refused for
    what the image says or has in its root file system.
    """
    raise NotImplementedError


def stop_signal(execution: Execution, options: RunOptions) -> int:
    """Return the number of the signal that asks the container to end; SIGTERM if nobody says."""
    raise NotImplementedError


def resource_limits(resources: Resources) -> LinuxResources:
    """Return what a cgroup is told, devices left out: for a start and for an update. InvalidArgument."""
    raise NotImplementedError


def write_bundle(folder: Path, spec: Spec) -> None:
    """Write `config.json` into a folder; what was there by that name is replaced."""
    raise NotImplementedError
