"""lamina: a content-addressed snapshot engine for container images.

    async with engine.open_engine("/var/lib/lamina") as e: ...

The public names are those of `__all__`, `engine.errors`, the contract in `engine.snapshots`, and
`engine.testing`. They are loaded when first used, so that a module below can be imported alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.app import Engine, open_engine
    from engine.gc.policy import Policy
    from engine.gc.scheduler import Schedule
    from engine.images.coordinating import Coordinator
    from engine.images.service import ImageService
    from engine.metadata.events import Event, Topic
    from engine.mount import Mount, activate, deactivate, mounted
    from engine.observing.listening import Missed
    from engine.observing.metering import Statistics
    from engine.observing.metrics import exposition
    from engine.observing.watching import Watch
    from engine.provision.provisioner import Provisioner
    from engine.running.containerizer import Containerizer, open_containerizer
    from engine.running.options import Bind, ExecOptions, IDMap, Network, Resources, RunOptions

__all__ = [
    "Bind",
    "Containerizer",
    "Coordinator",
    "Engine",
    "Event",
    "ExecOptions",
    "IDMap",
    "ImageService",
    "Missed",
    "Mount",
    "Network",
    "Policy",
    "Provisioner",
    "Resources",
    "RunOptions",
    "Schedule",
    "Statistics",
    "Topic",
    "Watch",
    "activate",
    "deactivate",
    "exposition",
    "mounted",
    "open_containerizer",
    "open_engine",
]

_HOMES = {
    "Bind": "running.options",
    "Containerizer": "running.containerizer",
    "Coordinator": "images.coordinating",
    "Engine": "app",
    "Event": "metadata.events",
    "ExecOptions": "running.options",
    "IDMap": "running.options",
    "ImageService": "images.service",
    "Missed": "observing.listening",
    "Network": "running.options",
    "Policy": "gc.policy",
    "Provisioner": "provision.provisioner",
    "Resources": "running.options",
    "RunOptions": "running.options",
    "Schedule": "gc.scheduler",
    "Statistics": "observing.metering",
    "Topic": "metadata.events",
    "Watch": "observing.watching",
    "exposition": "observing.metrics",
    "open_containerizer": "running.containerizer",
    "open_engine": "app",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{_HOMES.get(name, 'mount')}"), name)
