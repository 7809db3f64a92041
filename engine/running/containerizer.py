"""Containers run from images: launched, waited for, signalled, destroyed, found again after a restart.

Async. Every state is a record (`engine.metadata.containers`), every end a file
(`engine.running.outcome`): whoever has the store open can wait for, signal and destroy what another
process launched, and a container does not notice that the engine that launched it was killed.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
import trio

from engine.app import Engine
from engine.errors import FailedPrecondition
from engine.gc.collect import Collected
from engine.metadata.containers import Container, ContainerState
from engine.observing.counting import counted
from engine.observing.metering import Statistics, Verb
from engine.oci.platform import Platform
from engine.progress import Report, silent
from engine.provision.provisioned import Provisioned
from engine.provision.provisioner import Provisioner
from engine.running.launching import Launching
from engine.running.monitors import Monitors, open_monitors
from engine.running.options import Resources, RunOptions
from engine.running.settling import Settling, told
from engine.running.statuses import ContainerStatus, Ended, Failure, Launched, RecoveredContainers

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["AS_THE_IMAGE_SAYS", "Containerizer", "open_containerizer"]

AS_THE_IMAGE_SAYS = RunOptions()

_NO_VOLUMES: Mapping[str, str] = MappingProxyType({})
_LOOK_S = 0.05  # between two looks at what another process does


class Containerizer:
    """The containers of an open engine; get one from `open_containerizer`.

    Its methods may run concurrently.
    """

    def __init__(self, engine: Engine, monitors: Monitors) -> None:
        self.stores = engine.stores
        self._engine = engine
        self._settling = Settling(engine.stores)
        self._ending = Ending(self._settling, monitors)
        self._launching = Launching(engine.stores, self._settling, monitors)
        self._monitors = monitors
        self._provisioner = Provisioner(engine, stop=self._ending.end)
        self._launches = Turns()
        self._questions = Turns()

    # -- beginning ----------------------------------------------------------------------------

    @counted(Verb.LAUNCH)
    async def launch(  # noqa: PLR0913  one for each option of the command
        self,
        container: str,
        image: str,
        options: RunOptions = AS_THE_IMAGE_SAYS,
        *,
        parent: str = "",
        volumes: Mapping[str, str] = _NO_VOLUMES,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        client: "Client | None" = None,
        quota: int = 0,
        keep: bool = False,
        report: Report = silent,
    ) -> Launched:
        """Run an image in a container of an ID; return once its process was started.

        With a `client` what is not here is pulled. `volumes` are images by the path at which they are
        mounted in it. With a `parent`, which has to run, it joins that one's network, IPC and host name.
        An ID that is there is not launched again: it is told as it is, `already`.

        What fails, or is cancelled, leaves nothing; with `keep` a container whose command could not be
        started stays, stopped, with the exit code that a shell gives (126, 127). Raises NotFound,
        FailedPrecondition ("was removed while it was being made"), CommandFailed and others.
        """
        provision = partial(
            self._provisioner.provision,
            container,
            image,
            parent=parent,
            volumes=volumes,
            readonly=options.readonly,
            snapshotter=snapshotter,
            platform=platform,
            quota=quota,
            labels=options.labels,
            order=msgspec.json.encode(options),
            client=client,
            report=report,
        )
        async with self._launches.turn(container):
            while True:
                provisioned = await provision()
                record = await trio.to_thread.run_sync(self._settling.settle, provisioned.container)
                if record.state in {ContainerState.RUNNING, ContainerState.STOPPED}:
                    return Launched(told(record), already=True)
                if record.state == ContainerState.PROVISIONED:
                    started = await self._started(provisioned, options, parent, keep=keep)
                    if started is not None:
                        return Launched(told(started))
                elif await trio.to_thread.run_sync(self._settling.records.is_held, record):
                    await trio.sleep(_LOOK_S)  # another process launches it
                else:
                    await self._provisioner.destroy(container)  # a launch that was killed left it

    async def _started(
        self, provisioned: Provisioned, options: RunOptions, parent: str, *, keep: bool
    ) -> Container | None:
        """Start what is to run in a container; None if somebody else is at it."""
        mine = provisioned.container
        try:
            return await self._launching.start(provisioned, options, parent)
        except BaseException as error:
            if keep and isinstance(error, CommandFailed):
                raise
            with trio.CancelScope(shield=True):
                was_removed = await self._cleared(mine)
            if was_removed and isinstance(error, EngineError):
                why = f"container {mine.id} was removed while it was being made"
                raise FailedPrecondition(why) from error
            raise

    async def _cleared(self, mine: Container) -> bool:
        """Remove what is left of a launch that failed; say whether somebody else was at that before."""
        try:
            found = await trio.to_thread.run_sync(self._settling.records.get, mine.id)
        except NotFound:
            return True
        if found.unique != mine.unique:
            return True
        try:
            await self._provisioner.destroy(mine.id)
        except EngineError as error:  # what failed first says more; this stays in its status
            _log.warning("what a failed launch made stays for now: %s", error)
        return found.state == ContainerState.DESTROYING

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
        await self._ending.signal(record, signal)

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
            await self._ending.stop(record, signal, grace_s)
        return await self._ending.wait(record)

    async def update(self, container: str, resources: Resources) -> None:
        """Change what a running container may use."""
        record = await self._running(container)
        raise NotImplementedError

    async def usage(self, container: str) -> ContainerUsage:
        """Return what a container takes up: on disk, and while it runs of memory and processors."""
        record = await self._look(container)
        disk = await self._provisioner.usage(container)
        measured = None
        if record.state == ContainerState.RUNNING:
            measured = await trio.to_thread.run_sync(cgroups.usage, record.unique)
        return ContainerUsage(disk=disk, cgroup=measured)

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
        await trio.to_thread.run_sync(self._settling.walk)  # what began is not half made
        found = await self._provisioner.recover(known)
        kept = await self.walk()
        return RecoveredContainers(
            running=[one.id for one in kept if one.state == ContainerState.RUNNING],
            stopped=[one.id for one in kept if one.state == ContainerState.STOPPED],
            destroyed=found.destroyed,
            failed=[Failure(*one) for one in found.failed.items()],
        )

    async def prune(self, keep: Collection[str] = ()) -> Collected:
        """Remove all images but those to `keep` and those in use by a container, at any time."""
        return await self._provisioner.prune(keep)

    async def statistics(self) -> Statistics:
        """Return what this process has done to the store, and how many containers there are, by state."""
        counts = Counter(one.state for one in await self.walk())
        containers = {str(state): counts[state] for state in ContainerState}
        return msgspec.structs.replace(self._engine.statistics(), containers=containers)


@asynccontextmanager
async def open_containerizer(engine: Engine) -> AsyncIterator[Containerizer]:
    """Give the containers of an open engine for the length of a block; they run on after it."""
    async with open_monitors(engine.stores.root) as monitors:
        yield Containerizer(engine, monitors)
