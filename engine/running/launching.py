"""From a root file system that is there to a process that runs in it.

Async. Each step is written down before it begins, held by a lease of this process: who destroys the
container meanwhile moves its record, so that the next step is refused, and waits until the lease has ended.
"""

from functools import partial

import msgspec
import trio

from engine.errors import FailedPrecondition
from engine.failpoints import hit
from engine.metadata.containers import Container, ContainerState
from engine.oci.execution import parse_execution
from engine.provision.provisioned import Provisioned
from engine.running.bundle import Setting, make_spec, stop_signal, write_bundle
from engine.running.monitors import Monitors
from engine.running.options import Bind, RunOptions
from engine.running.settling import Settling
from engine.stores import Stores, host_platform
from engine.unpack.lease import begun_lease

__all__ = ["Launching"]


class Launching:
    """Starts what containers run."""

    def __init__(self, stores: Stores, settling: Settling, monitors: Monitors) -> None:
        self._stores = stores
        self._settling = settling
        self._monitors = monitors

    async def start(
        self, provisioned: Provisioned, options: RunOptions, parent: str
    ) -> Container | None:
        """Run what is wanted in a container that is provisioned; return its record.

        None if somebody else has launched or removed it. FailedPrecondition if it is removed meanwhile,
        or its parent does not run.
        """
        stores, record = self._stores, provisioned.container
        async with begun_lease(stores.root.meta, stores.namespace) as lease:
            try:
                record = await self._move(record, ContainerState.PREPARING, lease=lease.id)
            except FailedPrecondition:
                return None
            hit("launch.preparing")
            about = await trio.to_thread.run_sync(self._prepare, provisioned, options, parent)
            hit("launch.prepared")
            record = await self._move(record, ContainerState.STARTING, **about)
            hit("launch.starting")
            # It is not cut off half way: who clears up afterwards has to know what there is.
            with trio.CancelScope(shield=True):
                pid = await self._monitors.start(provisioned.folder, record.unique, options)
            hit("launch.started")
            return await self._move(record, ContainerState.RUNNING, pid=pid, lease="")

    async def _move(self, record: Container, state: ContainerState, **changes: object) -> Container:
        move = partial(self._settling.records.move, record, state, **changes)
        return await trio.to_thread.run_sync(move)

    def _prepare(self, provisioned: Provisioned, options: RunOptions, parent: str) -> dict[str, object]:
        """Write the bundle; return what its record says of it."""
        execution = parse_execution(provisioned.config)
        images = [
            Bind(source=str(folder), target=target, readonly=True)
            for target, folder in provisioned.volumes.items()
        ]
        setting = Setting(
            unique=provisioned.container.unique,
            rootfs=provisioned.rootfs,
            host=host_platform(),
            parent=self._process_of(parent) if parent else 0,
        )
        wanted = msgspec.structs.replace(options, binds=[*images, *options.binds])
        spec = make_spec(execution, wanted, setting)
        write_bundle(provisioned.folder, spec)
        signal = stop_signal(execution, options)
        return {"command": list(spec.process.args), "stop_signal": signal}

    def _process_of(self, parent: str) -> int:
        found = self._settling.get(parent)
        if found.state != ContainerState.RUNNING:
            raise FailedPrecondition(
                f"parent {parent} is {found.state}; a container joins one that runs"
            )
        return found.pid
