"""From a root file system that is there to a process that runs in it.

Async. Each step is written down before it begins, held by a lease of this process: who destroys the
container meanwhile moves its record, so that the next step is refused, and waits for the lease to end.
"""

from collections.abc import Sequence
from functools import partial

import msgspec
import trio

from engine.errors import CommandFailed, FailedPrecondition
from engine.failpoints import hit
from engine.kv.schema import now
from engine.metadata.containers import Container, ContainerState
from engine.oci.execution import parse_execution
from engine.provision.provisioned import Provisioned
from engine.running.attaching import Attachment
from engine.running.bundle import Setting, make_spec, stop_signal, write_bundle
from engine.running.jobs import Launch
from engine.running.monitors import Begun, Monitors
from engine.running.options import Bind, RunOptions
from engine.running.runc import run_argv
from engine.running.settling import SettledContainers
from engine.running.tool import Tool
from engine.stores import host_platform

__all__ = ["Begin", "Launching"]


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """How the process of a container is to begin."""

    options: RunOptions
    attached: bool = False
    """Whether the caller is its first client."""
    exit_argv: Sequence[str] = ()
    """Run when it has ended, its `unique` as the last word; not if the first client saw the end."""
    keep: bool = False
    """Whether the container stays if its command cannot be started."""


class Launching:
    """Starts what containers run."""

    def __init__(self, settling: SettledContainers, monitors: Monitors, tool: Tool) -> None:
        self._settling = settling
        self._monitors = monitors
        self._tool = tool

    async def start(
        self, provisioned: Provisioned, begin: Begin, lease: str
    ) -> tuple[Container, Attachment | None] | None:
        """Run what is wanted in a container that is provisioned; return its record and first client.

        It is held by a lease meanwhile. None if somebody else has launched or removed it.
        FailedPrecondition if it is removed meanwhile, or its parent does not run; CommandFailed and
        others of `Monitors.start` and `make_spec`.
        """
        record = provisioned.container
        try:
            record = await self._move(record, ContainerState.PREPARING, lease=lease)
        except FailedPrecondition:
            return None
        hit("launch.preparing")
        about = await trio.to_thread.run_sync(self._prepare, provisioned, begin.options)
        hit("launch.prepared")
        record = await self._move(record, ContainerState.STARTING, **about)
        hit("launch.starting")
        begun = await self._begun(provisioned, record, begin)
        hit("launch.started")
        try:
            running = partial(self._move, record, ContainerState.RUNNING)
            return await running(pid=begun.pid, lease=""), begun.attachment
        except BaseException:
            if begun.attachment:
                with trio.CancelScope(shield=True):
                    await begun.attachment.aclose()
            raise

    async def _move(self, record: Container, state: ContainerState, **changes: object) -> Container:
        move = partial(self._settling.records.move, record, state, **changes)
        return await trio.to_thread.run_sync(move)

    def _prepare(self, provisioned: Provisioned, options: RunOptions) -> dict[str, object]:
        """Write the bundle; return what the record says of it."""
        record = provisioned.container
        execution = parse_execution(provisioned.config)
        images = [
            Bind(source=str(folder), target=target, readonly=True)
            for target, folder in provisioned.volumes.items()
        ]
        setting = Setting(
            unique=record.unique,
            rootfs=provisioned.rootfs,
            host=host_platform(),
            parent=self._process_of(record.parent) if record.parent else 0,
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

    async def _begun(self, provisioned: Provisioned, record: Container, begin: Begin) -> Begun:
        options, tool = begin.options, self._tool
        runtime = await trio.to_thread.run_sync(tool.find)
        launch = Launch(
            folder=str(provisioned.folder),
            unique=record.unique,
            argv=run_argv(runtime, tool.states, record.unique, terminal=options.terminal),
            terminal=options.terminal,
            stdin=options.stdin,
            attached=begin.attached,
            exit_argv=(*begin.exit_argv, record.unique) if begin.exit_argv else (),
        )
        try:
            return await self._monitors.start(launch)
        except CommandFailed as error:
            if begin.keep:
                ended = {"exit_code": error.code, "ended": now(), "lease": ""}
                await self._move(record, ContainerState.STOPPED, **ended)
            raise
