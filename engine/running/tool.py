"""The runtime of a store, and what is asked of it about containers.

Sync; safe from any thread.
"""

from pathlib import Path

import msgspec

from engine.oci.runtime_spec import LinuxResources
from engine.root import Root
from engine.running import cgroups, runc
from engine.running.runc import Runtime

__all__ = ["Tool"]


class Tool:
    """What runs the containers of a root."""

    def __init__(self, root: Root, name: str | None = None) -> None:
        """`name` is a runtime's, or its path; else it is the first that works here."""
        self.states: Path = root.path / "runtime"
        self._name = name

    def find(self) -> Runtime:
        """Return the runtime. NotSupported if none works here."""
        return runc.find_runtime(self._name)

    def kill(self, unique: str, number: int) -> bool:
        """Send a signal to the first process of a container; False if that does not run any more."""
        return runc.kill(self.find(), self.states, unique, number)

    def clear(self, unique: str) -> None:
        """Remove what the runtime knows of a container, and its cgroup."""
        if (self.states / unique).exists():
            runc.delete(self.find(), self.states, unique)
        else:
            cgroups.remove(unique)

    def update(self, unique: str, resources: LinuxResources) -> None:
        """Change what a running container may use."""
        runc.update(self.find(), self.states, unique, msgspec.json.encode(resources))
