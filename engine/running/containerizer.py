"""Containers run from images: launched, waited for, signalled, destroyed, found again after a restart.

Async. Every state is a record (`engine.metadata.containers`), every end a file
(`engine.running.outcome`): whoever has the store open can wait for, signal and destroy what another
process launched, and a container does not notice that the engine that launched it was killed.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
import trio

from engine import limits
from engine.app import Engine
from engine.errors import EngineError, FailedPrecondition, NotFound
from engine.gc.collect import Collected
from engine.metadata.containers import Container, ContainerState
from engine.observing.counting import counted
from engine.observing.metering import Statistics, Verb
from engine.oci.platform import Platform
from engine.oci.signals import parse_signal
from engine.progress import Report, silent
from engine.provision.provisioned import Provisioned
from engine.provision.provisioner import Provisioner
from engine.running import cgroups
from engine.running.attaching import Attachment, attach
from engine.running.bundle import resource_limits
from engine.running.ending import Ending
from engine.running.executing import execute
from engine.running.launching import Begin, Launching
from engine.running.monitors import Monitors, open_monitors
from engine.running.options import ExecOptions, Resources, RunOptions
from engine.running.reaping import Reaper
from engine.running.settling import SettledContainers, told
from engine.running.statuses import (
    ContainerStatus,
    ContainerUsage,
    Ended,
    Failure,
    Launched,
    RecoveredContainers,
)
from engine.running.tool import Tool
from engine.running.turns import Turns
from engine.unpack.lease import begun_lease

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["Containerizer", "open_containerizer"]

_log = logging.getLogger(__name__)

_AS_THE_IMAGE_SAYS = RunOptions()

_NO_VOLUMES: Mapping[str, str] = MappingProxyType({})


class Containerizer:
    """The containers of an open engine; get one from `open_containerizer`.

    Its methods may run concurrently.
    """

    def __init__(self, engine: Engine, monitors: Monitors, runtime: str | None) -> None:
        self.stores = stores = engine.stores
        self._engine = engine
        self._monitors = monitors
        self._tool = Tool(stores.root, runtime)
        self._settling = SettledContainers(stores.root, stores.namespace)
        self._ending = Ending(self._settling, self._tool)
        self._launching = Launching(self._settling, monitors, self._tool)
        self._provisioner = Provisioner(engine, stop=self._ending.end)
        self._launches = Turns()
        self._questions = Turns()

    # -- beginning ----------------------------------------------------------------------------

    @counted(Verb.LAUNCH)
    async def launch(  # noqa: PLR0913  one for each option of the command
        self,
        container: str,
        image: str,
        options: RunOptions = _AS_THE_IMAGE_SAYS,
        *,
        parent: str = "",
        volumes: Mapping[str, str] = _NO_VOLUMES,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        client: "Client | None" = None,
        quota: int = 0,
        keep: bool = False,
        attached: bool = False,
        exit_argv: Sequence[str] = (),
        report: Report = silent,
    ) -> Launched:
        """Run an image in a container of an ID; return once its process was started.

        With a `client` what is not here is pulled. `volumes` are images by the path at which they are
        mounted in it. With a `parent`, which has to run, it joins that one's network, IPC and host name.
        With `attached` the caller is its first client, who misses nothing, and closes that in the end;
        `exit_argv`, and after it its `unique`, is a command that is run when it has ended unseen by him.
        An ID that is there is not launched again: it is told as it is, `already`.

        What fails, or is cancelled, leaves nothing; with `keep` a container whose command could not be
        started stays, stopped, with the exit code that a shell gives (126, 127). Raises NotFound,
        AlreadyExists for an ID of another image or other options, FailedPrecondition for one that is
        removed meanwhile, CommandFailed, and what a pull raises.
        """
        provision = partial(
            self._provisioner.provision,
            container,
            image,
            parent=parent,
            volumes=volumes,
            snapshotter=snapshotter,
            platform=platform,
            quota=quota,
            labels=options.labels,
            order=msgspec.json.encode(options),
            client=client,
            report=report,
        )
        begin = Begin(options=options, attached=attached, exit_argv=exit_argv, keep=keep)
        async with self._launches.turn(container):
            self._monitors.prepare()
            while True:
                launched = await self._launched(await provision(), begin)
                if launched is not None:
                    return launched

    async def _launched(self, provisioned: Provisioned, begin: Begin) -> Launched | None:
        """Launch a container that is provisioned, or tell of one that was; None: to be tried anew."""
        mine, lease = provisioned.container, ""
        try:
            record = await trio.to_thread.run_sync(self._settling.settle, mine)
            if record.state in {ContainerState.RUNNING, ContainerState.STOPPED}:
                return Launched(status=told(record), already=True)
            if record.state == ContainerState.PROVISIONED:
                async with begun_lease(self.stores.root.meta, self.stores.namespace) as held:
                    lease = held.id
                    started = await self._launching.start(provisioned, begin, lease)
                if started is not None:
                    record, attachment = started
                    return Launched(status=told(record), attachment=attachment)
            elif await trio.to_thread.run_sync(self._settling.is_half_made, record):
                await self._provisioner.destroy(record.id, is_meant=partial(_is_still, record))
            else:
                await trio.sleep(limits.CONTAINER_LOOK_S)  # another process launches it
        except BaseException as error:
            with trio.CancelScope(shield=True):
                was_removed = await self._cleared(mine, lease)
            if was_removed and isinstance(error, EngineError):
                why = f"container {mine.id} was removed while it was being made"
                raise FailedPrecondition(why) from error
            raise
        return None

    async def _cleared(self, mine: Container, lease: str) -> bool:
        """Remove what a launch that failed has left; say whether somebody else was at that before.

        That is its own container, held by its lease or by nobody yet; who else holds it goes on.
        """
        try:
            found = await trio.to_thread.run_sync(self._settling.records.get, mine.id)
        except NotFound:
            return True
        if found.unique != mine.unique:
            return True
        was_removed = found.state == ContainerState.DESTROYING
        is_own = found.state == ContainerState.PROVISIONED or (lease and found.lease == lease)
        if was_removed or is_own:
            try:
                await self._provisioner.destroy(mine.id)
            except EngineError as error:  # what failed first says more; this stays in its status
                _log.warning("what a failed launch made stays for now: %s", error)
        return was_removed

    # -- while it runs ------------------------------------------------------------------------

    async def status(self, container: str) -> ContainerStatus:
        """Return how a container is now; of several calls the first is answered first. NotFound."""
        async with self._questions.turn(container):
            return told(await self._look(container))

    async def walk(self) -> list[ContainerStatus]:
        """Return how each container is now, the oldest first."""
        found = await trio.to_thread.run_sync(self._settling.walk)
        return [told(record) for record in found]

    async def _look(self, container: str) -> Container:
        return await trio.to_thread.run_sync(self._settling.get, container)

    async def wait(self, container: str) -> Ended:
        """Wait until the process of a container has ended; one never begun has not. NotFound."""
        return await self._ending.wait(await self._look(container))

    async def kill(self, container: str, signal: int | str = "SIGKILL") -> None:
        """Send a signal to the first process of a container. FailedPrecondition if it does not run."""
        record = await self._running(container)
        number = parse_signal(str(signal))
        await self._ending.send(record, number)

    async def _running(self, container: str) -> Container:
        record = await self._look(container)
        if record.state != ContainerState.RUNNING:
            raise FailedPrecondition(f"container {container} is {record.state}: it does not run")
        return record

    async def stop(self, container: str, *, signal: int | str = "", grace_s: float = 10.0) -> Ended:
        """Have a container end: by its image's stop signal, and if it is still there then by SIGKILL.

        One that has ended is told as it is. FailedPrecondition for one that was never begun.
        """
        record = await self._look(container)
        if record.state != ContainerState.STOPPED:
            record = await self._running(container)
            number = parse_signal(str(signal)) if signal else record.stop_signal
            return await self._ending.stop(record, number, grace_s)
        return Ended(record.exit_code, record.ended)

    async def update(self, container: str, resources: Resources) -> None:
        """Change what a running container may use."""
        record = await self._running(container)
        wanted = resource_limits(resources)
        await trio.to_thread.run_sync(self._tool.update, record.unique, wanted)

    @asynccontextmanager
    async def attach(self, container: str) -> AsyncIterator[Attachment]:
        """Give a connection to what a container's process writes and reads, for the length of a block.

        FailedPrecondition if it does not run, or its monitor was killed.
        """
        record = await self._running(container)
        async with attach(self._settling.folder(record)) as attachment:
            yield attachment

    async def execute(
        self,
        container: str,
        options: ExecOptions,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> int:
        """Run a further command in a container that runs; return its exit code.

        The descriptors are the caller's, None for nothing. Cancelled, it is killed. CommandFailed if it
        cannot be run, NotFound for a user whom its root file system does not know.
        """
        record = await self._running(container)
        folder = self._settling.folder(record)

        runtime = await trio.to_thread.run_sync(self._tool.find)
        return await execute(
            runtime, self._tool.states, folder, options, stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def usage(self, container: str) -> ContainerUsage:
        """Return what a container takes up: on disk, and while it runs of memory and processors."""
        record = await self._look(container)
        disk = await self._provisioner.usage(container)
        consumed = None
        if record.state == ContainerState.RUNNING:
            consumed = await trio.to_thread.run_sync(cgroups.consumption, record.unique)
        return ContainerUsage(disk=disk, consumed=consumed)

    # -- ending -------------------------------------------------------------------------------

    @counted(Verb.DESTROY)
    async def destroy(self, container: str) -> bool:
        """Kill a container and its children, and remove all that there is of it; False if there is none.

        Who asks for the same at the same time waits for the same. A cancelled caller does not cancel it.
        What fails is raised, and stays in its status; asked again, it is tried again.
        """
        return await self._provisioner.destroy(container)

    async def recover(self, known: Collection[str] | None = None) -> RecoveredContainers:
        """Put in order what an engine that was killed, or a reboot, left; once after each start.

        Those that run keep running. All that are not `known` are destroyed, children first; without
        `known` only what was half made, or half destroyed.
        """
        cleared, failed = await self._clear_half_made()
        found = await self._provisioner.recover(known)
        kept: dict[str, list[str]] = defaultdict(list)
        for one in await self.walk():
            kept[one.state].append(one.id)
        return RecoveredContainers(
            running=kept[ContainerState.RUNNING],
            stopped=kept[ContainerState.STOPPED],
            provisioned=kept[ContainerState.PROVISIONED],
            destroyed=[*cleared, *found.destroyed],
            failed=[Failure(*one) for one in {**failed, **found.failed}.items()],
        )

    async def _clear_half_made(self) -> tuple[list[str], dict[str, str]]:
        """Remove what launches left whose engines were killed before there was a process.

        Return the IDs, and why others could not be removed.
        """
        cleared: list[str] = []
        failed: dict[str, str] = {}
        for record in await trio.to_thread.run_sync(self._settling.walk):
            half = await self._half_made(record)
            if half is not None:
                try:
                    if await self._provisioner.destroy(half.id, is_meant=partial(_is_still, half)):
                        cleared.append(half.id)
                except EngineError as error:
                    failed[record.id] = str(error)
        return cleared, failed

    async def _half_made(self, record: Container) -> Container | None:
        """Return what a launch left half made of a container, once its monitor, if any, has given up."""
        while record.state in {ContainerState.PREPARING, ContainerState.STARTING}:
            if await trio.to_thread.run_sync(self._settling.is_half_made, record):
                return record
            if await trio.to_thread.run_sync(self._settling.records.is_held, record):
                return None
            await trio.sleep(limits.CONTAINER_LOOK_S)
            try:
                record = await self._look(record.id)
            except NotFound:  # somebody else removed it
                return None
        return None

    async def prune(self, keep: Collection[str] = ()) -> Collected:
        """Remove all images but those to `keep` and those in use by a container, at any time."""
        return await self._provisioner.prune(keep)

    async def statistics(self) -> Statistics:
        """Return what this process has done to the store, and how many containers are in each state."""
        counts = Counter(one.state for one in await self.walk())
        containers = {str(state): counts[state] for state in ContainerState}
        return msgspec.structs.replace(self._engine.statistics(), containers=containers)


@asynccontextmanager
async def open_containerizer(
    engine: Engine, *, runtime: str | None = None, reaper: Reaper | None = None
) -> AsyncIterator[Containerizer]:
    """Give the containers of an open engine for the length of a block; they run on after it.

    `runtime` is the OCI runtime, by name or path; else it is the first of crun and runc that works here.
    Who is to launch as soon as he can has begun a `reaper` before (`engine.running.reaping`).
    """
    async with open_monitors(reaper) as monitors:
        yield Containerizer(engine, monitors, runtime)


def _is_still(record: Container, found: Container, _is_held: bool) -> bool:
    """Say whether a container is as it was: by then another may have finished it, or begun it anew."""
    return found == record
