"""Containers run from images: launched, waited for, signalled, destroyed, found again after a restart.

Async. Every state is a record (`engine.metadata.containers`), every end a file
(`engine.running.outcome`): whoever has the store open can wait for, signal and destroy what another
process launched, and a container does not notice that the engine that launched it was killed.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine.app import Engine
from engine.gc.collect import Collected
from engine.oci.platform import Platform
from engine.progress import Report, silent
from engine.running.options import Resources, RunOptions
from engine.running.statuses import ContainerStatus, Ended, Launched, RecoveredContainers

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["Containerizer", "open_containerizer"]

AS_THE_IMAGE_SAYS = RunOptions()


class Containerizer:
    """The containers of an open engine; get one from `open_containerizer`.

    Its methods may run concurrently.
    """

    async def launch(  # noqa: PLR0913  one for each option of the command
        self,
        container: str,
        image: str,
        options: RunOptions = AS_THE_IMAGE_SAYS,
        *,
        parent: str = "",
        volumes: Mapping[str, str] = {},
        snapshotter: str | None = None,
        platform: Platform | None = None,
        client: "Client | None" = None,
        quota: int = 0,
        labels: Mapping[str, str] = {},
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
        raise NotImplementedError

    async def wait(self, container: str) -> Ended:
        """Wait until the process of a container has ended; one never begun has not. NotFound."""
        raise NotImplementedError

    async def kill(self, container: str, signal: int | str = "SIGKILL") -> None:
        """Send a signal to the first process of a container. FailedPrecondition if it does not run."""
        raise NotImplementedError

    async def stop(self, container: str, *, signal: str = "", grace_s: float = 10.0) -> Ended:
        """Have a container end: by its image's stop signal, and if it is still there then by SIGKILL.

        One that has ended is told as it is.
        """
        raise NotImplementedError

    async def destroy(self, container: str) -> bool:
        """Kill a container and its children, and remove all that there is of it; False if there is none.

        Who asks for the same at the same time waits for the same. A cancelled caller does not cancel it.
        What fails is raised, and stays in its status; asked again, it is tried again.
        """
        raise NotImplementedError

    async def status(self, container: str) -> ContainerStatus:
        """Return how a container is now; of several calls the first is answered first. NotFound."""
        raise NotImplementedError

    async def walk(self) -> list[ContainerStatus]:
        """Return how each container is now, the oldest first."""
        raise NotImplementedError

    async def update(self, container: str, resources: Resources) -> None:
        """Change what a running container may use."""
        raise NotImplementedError

    async def recover(self, known: Collection[str] | None = None) -> RecoveredContainers:
        """Put in order what an engine that was killed, or a reboot, left; once after each start.

        Those that run keep running. All that are not `known` are destroyed, children first; without
        `known` only what was half made, or half destroyed.
        """
        raise NotImplementedError

    async def prune(self, keep: Collection[str] = ()) -> Collected:
        """Remove all images but those to `keep` and those in use by a container, at any time."""
        raise NotImplementedError


@asynccontextmanager
async def open_containerizer(engine: Engine) -> AsyncIterator[Containerizer]:
    """Give the containers of an open engine for the length of a block; they run on after it."""
    yield Containerizer()
