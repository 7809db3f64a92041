"""Finds snapshotters by their entry points and tells which of them work on a root.

Sync. The engine never imports a backend: `lamina.snapshotters` in anyone's package metadata is enough.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.errors import EngineError, InvalidArgument, NotSupported, ResourceExhausted, os_errors
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import remove_entry
from engine.kv.environment import Environment
from engine.mount import deactivate_below
from engine.root import Root
from engine.snapshots import Plugin, Probe, Snapshotter

__all__ = ["Backend", "backends", "check", "create", "default_name", "names", "sweep"]

_GROUP = "lamina.snapshotters"
_PROBE = ".probe-"  # and the ID of the owner that tries


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend and whether it works on a root."""

    name: str
    probe: Probe


@cache
def _plugins() -> dict[str, Plugin]:
    found = [_load(entry) for entry in entry_points(group=_GROUP)]
    return {plugin.name: plugin for plugin in sorted(found, key=lambda p: (p.rank, p.name))}


def _load(entry: EntryPoint) -> Plugin:
    """Return a backend's plugin; for one that cannot be loaded, a plugin that says so."""
    try:
        plugin = entry.load()
        assert isinstance(plugin, Plugin), "its entry point is not a Plugin"
        return plugin
    except Exception as error:  # noqa: BLE001  anyone's package may be broken; the others still work
        reason = f"cannot be loaded: {error}"

    def create(_folder: Path, _meta: Environment, _namespace: str) -> Snapshotter:
        raise NotSupported(f"snapshotter {entry.name} {reason}")

    return Plugin(entry.name, create, lambda _folder: Probe(False, False, reason), rank=1000)


def names() -> Sequence[str]:
    """Return the names of all backends, the preferred first."""
    return list(_plugins())


@cache
def _plugin(name: str) -> Plugin:
    named = [_load(entry) for entry in entry_points(group=_GROUP, name=name)]
    if len(named) == 1 and named[0].name == name:
        return named[0]  # and the others need not be loaded
    try:
        return _plugins()[name]
    except KeyError:
        known = ", ".join(_plugins())
        raise InvalidArgument(f"no snapshotter {name!r}; there are {known}") from None


def create(root: Root, name: str, namespace: str) -> Snapshotter:
    """Return the backend `name` on a root. InvalidArgument, NotSupported where it cannot be loaded."""
    try:
        return _plugin(name).create(root.snapshots / name, root.meta, namespace)
    except EngineError:
        raise
    except Exception as error:
        raise NotSupported(f"snapshotter {name} cannot be used: {error}") from error


def backends(root: Root) -> list[Backend]:
    """Try every backend on a root, the preferred first."""
    found = []
    for name, plugin in _plugins().items():
        try:
            found.append(Backend(name, _probe_or_reason(root, plugin)))
        except ResourceExhausted as error:
            found.append(Backend(name, _unusable(error)))
    return found


def _probe_or_reason(root: Root, plugin: Plugin) -> Probe:
    try:
        return _probe(root, plugin)
    except ResourceExhausted:
        raise
    except Exception as error:  # noqa: BLE001  anyone's package may be broken; the others still work
        return _unusable(error)


def _unusable(error: Exception) -> Probe:
    return Probe(unpacks=False, mounts=False, reason=str(error))


def _probe(root: Root, plugin: Plugin) -> Probe:
    prefix = f"{_PROBE}{root.owners.me.id}-"
    with os_errors(f"trying {plugin.name}"), TemporaryDirectory(prefix=prefix, dir=root.trash) as name:
        return plugin.probe(Path(name))


def check(root: Root, name: str) -> None:
    """Raise InvalidArgument if there is no such backend, NotSupported if it cannot unpack on a root.

    ResourceExhausted where the disk is too full to tell; so does `default_name`.
    """
    probe = _probe_or_reason(root, _plugin(name))
    if not probe.unpacks:
        raise NotSupported(f"snapshotter {name} does not work here: {probe.reason}")


def sweep(root: Root, until: float = math.inf) -> None:
    """Remove what probes of dead owners left behind, mounts among it, until then (monotonic clock)."""
    for folder in root.trash.glob(f"{_PROBE}*"):
        if time.monotonic() > until:
            return
        owner = folder.name.removeprefix(_PROBE).partition("-")[0]
        if not root.owners.is_alive(owner):
            deactivate_below(folder)
            with (
                os_errors(str(folder)),
                folder_descriptor(root.trash) as trash,
                suppress(FileNotFoundError),
            ):
                remove_entry(trash, os.fsencode(folder.name))


def default_name(root: Root) -> str:
    """Return the preferred backend that can mount on a root. NotSupported if there is none."""
    reasons = []
    for name, plugin in _plugins().items():
        probe = _probe(root, plugin)
        if probe.mounts:
            return name
        reasons.append(f"{name}: {probe.reason}")
    raise NotSupported(f"no snapshotter works here ({'; '.join(reasons)})")
