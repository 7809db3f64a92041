"""Finds snapshotters by their entry points and tells which of them work on a root.

Sync. The engine never imports a backend: `lamina.snapshotters` in anyone's package metadata is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from engine.errors import InvalidArgument, NotSupported
from engine.root import Root
from engine.snapshots import Plugin, Probe, Snapshotter

__all__ = ["Backend", "backends", "create", "default_name", "names"]

_GROUP = "lamina.snapshotters"


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend and whether it works on a root."""

    name: str
    probe: Probe


@cache
def _plugins() -> dict[str, Plugin]:
    found = (entry.load() for entry in entry_points(group=_GROUP))
    return {plugin.name: plugin for plugin in sorted(found, key=lambda p: (p.rank, p.name))}


def names() -> Sequence[str]:
    """Return the names of all backends, the preferred first."""
    return list(_plugins())


def _plugin(name: str) -> Plugin:
    try:
        return _plugins()[name]
    except KeyError:
        known = ", ".join(_plugins())
        raise InvalidArgument(f"no snapshotter {name!r}; there are {known}") from None


def create(root: Root, name: str, namespace: str) -> Snapshotter:
    """Return the backend `name` on a root. InvalidArgument if there is none of that name."""
    return _plugin(name).create(root.snapshots / name, root.meta, namespace)


def backends(root: Root) -> list[Backend]:
    """Try every backend on a root, the preferred first."""
    return [Backend(name, _probe(root, plugin)) for name, plugin in _plugins().items()]


def _probe(root: Root, plugin: Plugin) -> Probe:
    # In trash/: what a killed probe leaves behind is then swept up like any other leftover.
    return plugin.probe(root.trash)


def default_name(root: Root) -> str:
    """Return the preferred backend that can mount on a root. NotSupported if there is none."""
    reasons = []
    for name, plugin in _plugins().items():
        probe = _probe(root, plugin)
        if probe.mounts:
            return name
        reasons.append(f"{name}: {probe.reason}")
    raise NotSupported(f"no snapshotter works here ({'; '.join(reasons)})")
