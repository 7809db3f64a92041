"""Root file systems for containers: made of images, held while they are there, gone when they should be.

Async.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING

from engine.app import Engine
from engine.gc.collect import Collected
from engine.kv.schema import Container
from engine.labels import Labels
from engine.oci.platform import Platform
from engine.progress import Report, silent
from engine.provision.provisioned import Provisioned, Recovered
from engine.snapshots import Usage

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["Provisioner", "Stop"]

Stop = Callable[[Container], Awaitable[None]]
"""Sees to it that nothing runs in a container any more, and that nothing of its runtime is left.

Called, and perhaps called again after a crash, with the record of a container that is `destroying`,
before anything of it is unmounted; raises if it cannot be done, and then the container stays.
"""


class Provisioner:
    """The root file systems of containers of an open engine; its methods may run concurrently."""

    def __init__(self, engine: Engine, *, stop: Stop | None = None) -> None:
        """`stop` ends what runs in a container; without it one that may run is not destroyed."""

    async def provision(  # noqa: PLR0913  each is another's matter
        self,
        container: str,
        image: str,
        *,
        parent: str = "",
        volumes: Mapping[str, str] | None = None,
        readonly: bool = False,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        quota: int = 0,
        labels: Labels | None = None,
        order: bytes = b"",
        client: "Client | None" = None,
        report: Report = silent,
    ) -> Provisioned:
        """Make, mount and hold the root file system of a container; what is not unpacked is.

        `volumes` are images by the absolute path at which they are to be in the container: mounted
        read-only beside it. With a `client` what is not here is pulled. `quota` is in bytes, `order` what
        the container is to run. The same asked again is given again, at whatever state it is; so is what
        others are making just now, once it is made. What fails, or is cancelled, leaves nothing.

        AlreadyExists for an ID with another image, parent, volumes, platform or backend; NotFound for what
        is not here; FailedPrecondition if it was destroyed meanwhile, or its parent is.
        """
        raise NotImplementedError

    async def destroy(self, container: str) -> bool:
        """Unmount and remove all of a container, children first; False if there is none.

        One that is being made is cancelled, whoever makes it, and what was made goes once that has really
        ended. Who asks for the same at the same time gets the same answer; a caller who is cancelled
        cancels nothing. What fails stays in its record (`destroying`, `errors`, `error`): asked again, it
        is tried again. FailedPrecondition if something may run in it and nobody was given to stop that.
        """
        raise NotImplementedError

    async def recover(self, known: Collection[str] | None = None) -> Recovered:
        """Put in order what a crash or a reboot left: once after each start.

        All but the `known` are destroyed, children first; without `known` only what was half made or
        half destroyed. Of the others what is not mounted any more is mounted again.
        """
        raise NotImplementedError

    async def prune(self, keep: Collection[str] = ()) -> Collected:
        """Remove the names of all images but those to `keep` and those in use, and collect.

        InvalidArgument for what is no name, before anything is removed; FailedPrecondition if the record of
        a container cannot be read, as nobody knows what that uses.
        """
        raise NotImplementedError

    async def usage(self, container: str) -> dict[str, Usage]:
        """Return what a container itself takes up: bytes and inodes, by where it is mounted in it.

        The root is "/"; read-only ones take up nothing of their own. NotFound.
        """
        raise NotImplementedError

    async def status(self, container: str) -> Container:
        """Return the record of a container. NotFound."""
        raise NotImplementedError

    async def walk(self) -> list[Container]:
        """Return the containers, the oldest first."""
        raise NotImplementedError

    async def update(
        self, container: str, *, labels: Labels | None = None, quota: int | None = None
    ) -> Container:
        """Change labels, deleting those whose new value is empty, and the quota; return the record.

        What it is made of stays: whatever becomes of a tag, a container holds what it runs.
        """
        raise NotImplementedError
