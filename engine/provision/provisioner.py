"""Root file systems for containers: made of images, held while they are there, and gone after that.

Async. All that anybody has to know is in records (`engine.metadata.provisions`): several of these, in
any processes, may work on one store, and none has to be there for another's containers to be safe. Who
makes a container holds it by a lease; who wants it gone moves its record, which the other's next step
finds: then that one removes what he made. Who finds work in progress waits for its end.
"""

import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import trio

from engine import labels as label_rules
from engine.app import Engine
from engine.beside import beside
from engine.errors import AlreadyExists, EngineError, FailedPrecondition, InvalidArgument, NotFound
from engine.failpoints import hit
from engine.gc.collect import Collected
from engine.kv.schema import Container
from engine.labels import Labels
from engine.metadata.containers import ON_THE_WAY, ContainerState
from engine.metadata.provisions import IsMeant, anyone
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.progress import Report, silent
from engine.provision.destroying import FIRST_LOOK_S, Destroyer, Stop, rest
from engine.provision.mending import Mender
from engine.provision.provisioned import Provisioned, Recovered
from engine.provision.quota import check_quotas
from engine.provision.rootfs import RootFileSystems, joined
from engine.provision.wanted import ContainerWanted, FoundImage, ImageChoice
from engine.snapshots import Usage

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["Provisioner", "Stop"]

_log = logging.getLogger(__name__)

_HALF_MADE = {*ON_THE_WAY, ContainerState.PREPARING}
_NO_LABELS: Labels = MappingProxyType({})
_NO_VOLUMES: Mapping[str, str] = MappingProxyType({})


class Provisioner:
    """The root file systems of containers of an open engine; its methods may run concurrently."""

    def __init__(self, engine: Engine, *, stop: Stop | None = None) -> None:
        """`stop` ends what runs in a container; without it one that may run is not destroyed."""
        self._engine = engine
        self._stores = engine.stores
        self._containers = engine.stores.containers
        self._provisions = engine.stores.provisions
        self._roots = RootFileSystems(engine.stores)
        self._mender = Mender(engine.stores, self._roots)
        self._choice = ImageChoice(engine.stores)
        self._destroyer = Destroyer(engine.stores, self._roots, stop)

    # -- making -------------------------------------------------------------------------------

    async def provision(  # noqa: PLR0913  each is another's matter
        self,
        container: str,
        image: str,
        *,
        parent: str = "",
        volumes: Mapping[str, str] = _NO_VOLUMES,
        readonly: bool = False,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        quota: int = 0,
        labels: Labels = _NO_LABELS,
        order: bytes = b"",
        client: "Client | None" = None,
        report: Report = silent,
    ) -> Provisioned:
        """Make, mount and hold the root file system of a container; what is not unpacked is.

        `volumes` are images by the absolute path at which they are to be in the container: mounted
        read-only beside it. With a `client` what is not here is pulled. `quota` is in bytes, `order`
        what the container is to run. The same asked again is given again, whatever state it is in; so
        is what others are making just now, once it is made. What fails, or is cancelled, leaves nothing.

        AlreadyExists for an ID with another image, parent, volumes, platform or backend; NotFound for
        what is not here; FailedPrecondition if it is destroyed meanwhile, or its parent is; NotSupported
        for a quota where the file system of the store has none.
        """

        def want() -> ContainerWanted:
            stores, name = self._stores, self._choice.full_name
            wanted = ContainerWanted(
                container=container,
                image=name(image),
                volumes={path: name(one) for path, one in volumes.items()},
                parent=parent,
                readonly=readonly,
                backend=stores.working(snapshotter) if snapshotter else stores.snapshotter(),
                is_backend_named=snapshotter is not None,
                platform=platform,
                quota=quota,
                labels=labels,
                order=order,
            )
            wanted.check()
            if quota and not readonly:  # before anything is pulled
                check_quotas(stores.root.snapshots)
            return wanted

        wanted = await trio.to_thread.run_sync(want)
        while True:
            try:
                mine, found = await trio.to_thread.run_sync(self._begin, wanted)
            except AlreadyExists:
                standing = await self._standing(wanted)
                if standing:
                    return standing
                continue  # it is gone by now
            return await self._make(mine, wanted, found, client, report)

    def _begin(self, wanted: ContainerWanted) -> tuple[Container, Sequence[FoundImage]]:
        """Put the record of a container; return it, and its images if they are here and held."""
        found = [one for name in wanted.images if (one := self._choice.find(name, wanted))]
        is_whole = len(found) == len(wanted.images)
        record = wanted.record()
        roots = self._choice.roots(record, found) if is_whole else ()
        mine, is_held = self._provisions.begin(record, roots)
        return mine, found if is_held else ()

    async def _make(
        self,
        mine: Container,
        wanted: ContainerWanted,
        found: Sequence[FoundImage],
        client: "Client | None",
        report: Report,
    ) -> Provisioned:
        try:
            hit("provision.recorded")
            if not found:
                async with self._unless_moved(mine):
                    found = await self._bring_all(mine, wanted, client, report)
                hit("provision.brought")
                mine = await trio.to_thread.run_sync(self._hold, mine, found)
            hit("provision.held")
            return await trio.to_thread.run_sync(self._made, mine, found)
        except BaseException:
            was_asked = False
            try:
                was_asked = await self._destroyer.undo(mine)
            except EngineError as error:  # what failed first says more, and this is in the record
                _log.warning("what was made of container %s stays for now: %s", mine.id, error)
            if was_asked:
                raise FailedPrecondition(
                    f"container {mine.id} was removed while it was being made"
                ) from None
            raise

    def _hold(self, mine: Container, found: Sequence[FoundImage]) -> Container:
        return self._provisions.hold(mine, self._choice.roots(mine, found))

    def _made(self, mine: Container, found: Sequence[FoundImage]) -> Provisioned:
        for one in found:
            self._stores.images.note_use(one.image)
        claims = [root.mount for root in self._choice.roots(mine, found)]
        return self._roots.make(mine, claims)

    async def _standing(self, wanted: ContainerWanted) -> Provisioned | None:
        """Return the container that is there, once nobody makes it any more; None if it is gone then."""
        pause = FIRST_LOOK_S
        looking = partial(self._containers.find, wanted.container)
        while (looked := await trio.to_thread.run_sync(looking)) is not None:
            found, is_held = looked
            if _is_left_unmade(found, is_held):
                await self.destroy(found.id, is_meant=_is_left_unmade)
                continue
            if not wanted.is_met_by(found):
                raise AlreadyExists(
                    f"container {found.id} exists, and was made with other options; choose another name"
                )
            if found.state == ContainerState.DESTROYING:
                raise FailedPrecondition(f"container {found.id} is being removed; try again")
            if found.state != ContainerState.PROVISIONING:
                given = await trio.to_thread.run_sync(self._given, found)
                if given:
                    return given
            pause = await rest(pause)
        return None

    def _given(self, found: Container) -> Provisioned | None:
        """Return what there is of a container, mounted; None if it is gone, or another is at it."""
        for error in self._mender.mend([found]).values():
            raise error
        looked = self._containers.find(found.id)
        if looked is None or looked[0].state in ON_THE_WAY or not self._roots.is_whole(looked[0]):
            return None
        try:
            return self._roots.provisioned(looked[0])
        except NotFound:
            if self._containers.find(found.id) == looked:
                raise
            return None

    # -- images that are not here yet ---------------------------------------------------------

    async def _bring_all(
        self, mine: Container, wanted: ContainerWanted, client: "Client | None", report: Report
    ) -> list[FoundImage]:
        """Pull and unpack what is missing, all at once."""
        found: dict[str, FoundImage] = {}
        errors: list[EngineError] = []

        async def bring(name: str) -> None:
            try:
                found[name] = await self._bring(mine, name, wanted, client, report)
            except EngineError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for name in dict.fromkeys(wanted.images):
                nursery.start_soon(bring, name)
        if errors:
            raise joined(errors)
        return [found[name] for name in wanted.images]

    async def _bring(
        self,
        mine: Container,
        name: str,
        wanted: ContainerWanted,
        client: "Client | None",
        report: Report,
    ) -> FoundImage:
        """Return an image, held by the lease of the container, which is made to be here unpacked."""
        engine, backend = self._engine.using(mine.lease), wanted.backend.name
        try:
            image = await trio.to_thread.run_sync(self._stores.images.get, name)
            await engine.unpack(name, snapshotter=backend, platform=wanted.platform, report=report)
        except NotFound:
            if client is None:
                raise
            pulled = await engine.pull(
                name, client, snapshotter=backend, platform=wanted.platform, report=report
            )
            image = pulled.image
        return await trio.to_thread.run_sync(self._choice.look, image, wanted)

    @asynccontextmanager
    async def _unless_moved(self, mine: Container) -> AsyncIterator[None]:
        """End the block once somebody moves the record of a container. FailedPrecondition."""

        async def watch() -> None:
            pause = FIRST_LOOK_S
            while await trio.to_thread.run_sync(self._containers.find, mine.id) == (mine, True):
                pause = await rest(pause)
            scope.cancel()

        with trio.CancelScope() as scope:
            async with beside() as nursery:
                nursery.start_soon(watch)
                yield
        if scope.cancelled_caught:
            raise FailedPrecondition(f"container {mine.id} was changed meanwhile")

    # -- removing -----------------------------------------------------------------------------

    async def destroy(self, container: str, *, is_meant: IsMeant = anyone) -> bool:
        """Unmount and remove all of a container, children first; False if there is none that is meant.

        `is_meant` looks at it in the last moment: it may be another of the same ID by then.
        One that is being made is cancelled, whoever makes it, and what was made goes once that has
        really ended. Who asks for the same at the same time gets the same answer; a caller who is
        cancelled cancels nothing. What fails stays in its record (`destroying`, `errors`, `error`):
        asked again, it is tried again. FailedPrecondition if something may run in it and nobody was
        given to stop that.
        """
        return await self._destroyer.destroy(container, is_meant=is_meant)

    # -- after a crash ------------------------------------------------------------------------

    async def recover(self, known: Collection[str] | None = None) -> Recovered:
        """Put in order what a crash or a reboot left: once after each start.

        All but the `known` are destroyed, children first; without `known` only what was half made or
        half destroyed. What is labelled `labels.EPHEMERAL` is known to nobody, and with a parent go its
        children, known or not. Of the others what is not mounted any more is mounted again, and what
        ran in another boot is `stopped`.
        """
        if isinstance(known, str):
            raise InvalidArgument("recover takes a list of containers, not one")
        found = await trio.to_thread.run_sync(self._containers.walk)
        damaged = await trio.to_thread.run_sync(self._containers.damaged)
        failed = {record.name: record.error for record in damaged}

        def is_to_go(container: Container, is_held: bool) -> bool:
            if known is not None and (
                container.id not in known or label_rules.EPHEMERAL in container.labels
            ):
                return True
            return container.state in _HALF_MADE and not is_held

        def going() -> list[str]:
            is_held = self._containers.is_held
            return [one.id for one in found if is_to_go(one, is_held(one))]

        for container in await trio.to_thread.run_sync(going):
            try:
                await self.destroy(container, is_meant=is_to_go)
            except EngineError as error:
                failed[container] = str(error)
        left = await trio.to_thread.run_sync(self._containers.walk)
        standing = [one for one in left if one.id not in failed]
        broken = await trio.to_thread.run_sync(self._mender.mend, standing)
        failed |= {name: str(error) for name, error in broken.items()}
        kept = [one.id for one in standing if one.id not in broken]
        await trio.to_thread.run_sync(self._roots.sweep, self._roots.uniques)
        there = {container.id for container in left}
        destroyed = [container.id for container in found if container.id not in there]
        return Recovered(kept=kept, destroyed=destroyed, failed=failed)

    # -- images -------------------------------------------------------------------------------

    async def prune(self, keep: Collection[str] = ()) -> Collected:
        """Remove the names of all images but those to `keep`, in use or pinned, and collect.

        InvalidArgument for what is no name, before anything is removed; FailedPrecondition if the
        record of a container cannot be read, as nobody knows what that uses.
        """
        if isinstance(keep, str):
            raise InvalidArgument("prune takes a list of names to keep, not one")
        kept = {str(parse_reference(name)) for name in keep}
        await trio.to_thread.run_sync(self._drop_names, kept)
        return await self._engine.collect()

    def _drop_names(self, kept: Collection[str]) -> None:
        # First the images: a name that is given to a container after this is one that it was made of.
        images = self._stores.images.walk()
        damaged = self._containers.damaged()
        if damaged:
            names = ", ".join(one.name for one in damaged)
            raise FailedPrecondition(
                f"nobody knows what containers {names} use, their records cannot be read; "
                "see `lamina fsck`"
            )
        containers = self._containers.walk()
        used = {name for one in containers for name in (one.image, *one.volumes.values())}
        targets = {one.target for one in containers}
        going = {
            image.name: image.target.digest
            for image in images
            if image.name not in kept
            and image.name not in used
            and image.target.digest not in targets
            and image.labels.get(label_rules.PINNED) != label_rules.PINNED_VALUE
        }
        self._stores.images.drop_all(going)

    # -- asking and changing ------------------------------------------------------------------

    async def usage(self, container: str) -> dict[str, Usage]:
        """Return what a container itself takes up: bytes and inodes, by where it is mounted in it.

        The root is "/"; read-only ones take up nothing of their own but an inode. NotFound.
        """

        def measured() -> dict[str, Usage]:
            return self._roots.usage(self._containers.get(container))

        return await trio.to_thread.run_sync(measured)

    async def status(self, container: str) -> Container:
        """Return the record of a container. NotFound."""
        return await trio.to_thread.run_sync(self._containers.get, container)

    async def walk(self) -> list[Container]:
        """Return the containers, the oldest first."""
        return await trio.to_thread.run_sync(self._containers.walk)

    async def update(
        self, container: str, *, labels: Labels = _NO_LABELS, quota: int | None = None
    ) -> Container:
        """Change labels, deleting those whose new value is empty, and the quota; return the record.

        What it is made of stays: whatever becomes of a tag, a container holds what it runs.
        FailedPrecondition while somebody works on it, and for the quota of one that was made without.
        """

        def updated() -> Container:
            found = self._containers.get(container)
            held = [] if found.state in ON_THE_WAY else self._provisions.resume(found)
            if not held:
                raise FailedPrecondition(f"container {container} is being made, changed or removed")
            (mine,) = held
            try:
                size = mine.quota if quota is None else quota
                self._roots.resize(mine, size)
                merged = label_rules.merge(mine.labels, labels)
                return self._provisions.settle(mine, (), labels=merged, quota=size)
            except BaseException:
                self._provisions.leave(mine)
                raise

        return await trio.to_thread.run_sync(updated)


def _is_left_unmade(container: Container, is_held: bool) -> bool:
    """Say whether who was making a container died over it."""
    return container.state == ContainerState.PROVISIONING and not is_held
