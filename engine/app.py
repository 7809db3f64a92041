"""The engine in process: what a container runtime links in.

Async. Slow work runs on threads and in worker processes; every operation holds a lease for what it
makes or finds until that is anchored.
"""

import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from engine.archive.importer import Wanted
from engine.beside import beside
from engine.collecting import Collect, collecting, collector
from engine.diff.apply import Applied
from engine.errors import EngineError
from engine.fsck.findings import Checked, Finding
from engine.gc.collect import Collected
from engine.gc.scheduler import Schedule
from engine.importing import Importing, ImportResult
from engine.mount import Mount
from engine.observing.counting import counted
from engine.observing.listening import Listening
from engine.observing.metering import Statistics, Verb
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.progress import Report, Step, silent
from engine.pulling import Pulled, Pulling, PullWanted
from engine.pushing import Pushing
from engine.registry.sending import Pushed
from engine.snapshots import Durability, Snapshotter
from engine.stores import Stores, host_platform, open_stores
from engine.unpack.flights import Flight
from engine.unpack.jobs import ApplyJob
from engine.unpack.lease import HeldLease, begun_lease
from engine.unpack.making import CLEANUP_S
from engine.unpack.unpacker import Unpacked, Unpacker
from engine.unpack.workshop import Workshop, open_workshop

if TYPE_CHECKING:  # which loads httpcore, and few commands need that
    from engine.registry.client import Client

__all__ = ["Engine", "open_engine"]


_log = logging.getLogger(__name__)


class _Over(BaseException):
    """Whoever asked for a check has left."""


class Engine:
    """An open engine; get one from `open_engine`. Its methods may run concurrently."""

    def __init__(
        self,
        stores: Stores,
        workshop: Workshop,
        collect: Collect | None = None,
        durability: Durability = Durability.FULL,
    ) -> None:
        """`collect` collects, if that is by a schedule."""
        self.stores = stores
        self._collect = collect or collector(stores)
        self._shop = workshop
        self._durability = durability
        self._unpacker = Unpacker(
            stores.root.path, stores.namespace, stores.content, workshop, durability
        )
        self._heir = ""

    def using(self, lease: str) -> "Engine":
        """Return this engine, for calls whose results a lease of the caller's is to hold.

        What such a call made or found, the lease holds once it has succeeded. A call raises NotFound if
        there is no such lease in `stores.leases`, FailedPrecondition if it has expired. If it is removed
        meanwhile, that is told in the end, and what was done is as without it.
        """
        other = copy(self)
        other._heir = lease
        return other

    @counted(Verb.IMPORT)
    async def import_image(  # noqa: PLR0913  one for each option of the command
        self,
        source: Path | str | int,
        *,
        name: str | None = None,
        refs: Sequence[str] = (),
        snapshotter: str | None = None,
        platform: Platform | None = None,
        strict: bool = False,
        replace: bool = False,
        report: Report = silent,
    ) -> ImportResult:
        """Import the images of a folder, an archive or a pipe, by path or open descriptor.

        An OCI layout, `docker save`'s form and skopeo's `dir:` are told apart by content. With
        `snapshotter` images are also unpacked, before they get their names, all at once. What fails
        leaves nothing behind. `refs` choose images by name, tag or digest; `name` is for one image;
        `strict` refuses a layer whose media type disagrees with its bytes; `replace` lets a name move.

        What is no image is passed over, and an image that is bad beside good ones is in the result; if
        it was asked for or none is good, its error is raised: Refused, NotFound, AlreadyExists and
        others (`engine.errors`).
        """
        backend = None
        if snapshotter:
            backend = await trio.to_thread.run_sync(self.stores.working, snapshotter)
        wanted = Wanted(
            platform=platform or self.stores.platform,
            refs=tuple(refs),
            name=str(parse_reference(name)) if name else None,
        )
        importing = Importing(
            stores=self.stores,
            unpacker=self._unpacker,
            arrivals=self._shop.arrivals,
            wanted=wanted,
            backend=backend,
            strict=strict,
            replace=replace,
            report=report,
        )
        is_whole = False
        heir = ""
        async with self._lease() as lease:
            try:
                origin = source if isinstance(source, int) else Path(source)
                result = await importing.run(origin, lease)
                is_whole = not result.failed
                heir = self._heir  # of what is good, beside images that failed
                return result
            finally:
                # Else another caller works with what this one began.
                if not is_whole and lease.is_last:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._give_up, lease.id, heir)

    @counted(Verb.PULL)
    async def pull(  # noqa: PLR0913  one for each option of the command
        self,
        reference: str,
        client: "Client",
        *,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        all_platforms: bool = False,
        keep_blobs: bool = True,
        strict: bool = False,
        lasting: bool = True,
        report: Report = silent,
    ) -> Pulled:
        """Pull an image by its name, with a client of `engine.registry.client.open_client`.

        With `snapshotter` its layers are unpacked while they come. The name is put, or moved, last. With
        `all_platforms` all that an index lists is fetched, what is for `platform` unpacked. Without
        `keep_blobs` the layers' blobs are left to the next collection once they are unpacked: the image
        can be run, but not be pushed or unpacked for another backend (`docs/images.md`). A new name that
        is not `lasting` goes with the image, once nothing else keeps that.

        Who wants the same at the same time, of the same client, shares one pull; the last to be
        cancelled ends it. What an attempt that failed has fetched is there for the next, for a day.

        Raises NotFound, PermissionDenied, Unavailable, Refused and others (`engine.errors`).
        """
        backend = None
        if snapshotter:
            backend = await trio.to_thread.run_sync(self.stores.working, snapshotter)
        wanted = PullWanted(
            reference=parse_reference(reference),
            platform=platform or self.stores.platform,
            backend=snapshotter,
            all_platforms=all_platforms,
            keep_blobs=keep_blobs,
            strict=strict,
            lasting=lasting,
        )
        wanted.check()
        pull = partial(self._pulled, client, wanted, backend)
        if self._heir:
            await trio.to_thread.run_sync(self.stores.leases.check, self._heir)
        async with self._shop.pulls.caller(report) as join:
            # By the client, which is by who asks: nobody gets what another was let in for.
            flight = join((self.stores.namespace, self._durability, client, wanted.key), pull)
            pulled: Pulled
            pulled, lease = await flight.result()
            await self._hand_over(lease)
        return pulled

    @asynccontextmanager
    async def _pulled(
        self, client: "Client", wanted: PullWanted, backend: Snapshotter | None, flight: Flight[Any]
    ) -> AsyncIterator[tuple[Pulled, HeldLease]]:
        """Give a pulled image, and the lease that holds it until the end of the block."""
        pulling = Pulling(
            stores=self.stores,
            unpacker=self._unpacker,
            arrivals=self._shop.arrivals,
            client=client,
            wanted=wanted,
            lanes=self._shop.lanes,
            backend=backend,
            applies=self._shop.pool.slots.places,
            report=flight.report,
        )
        async with begun_lease(self.stores.root.meta, self.stores.namespace) as lease:
            yield await pulling.run(lease), lease

    @counted(Verb.PUSH)
    async def push(
        self,
        name: str,
        client: "Client",
        reference: str | None = None,
        *,
        platform: Platform | None = None,
        report: Report = silent,
    ) -> Pushed:
        """Push an image to a registry, by its own name or by `reference`: only what is not there.

        All of an index goes, or one platform's image alone. The name is put, or moved, there last.
        Raises FailedPrecondition where a part is not here, PermissionDenied, Unavailable, Refused and
        others.
        """
        pushing = Pushing(
            stores=self.stores,
            client=client,
            lanes=self._shop.lanes,
            name=name,
            reference=parse_reference(reference) if reference else None,
            platform=platform,
            report=report,
        )
        async with self._lease() as lease:
            return await pushing.run(lease.id)

    def _give_up(self, lease: str, heir: str) -> None:
        try:
            self.stores.give_up(lease, seconds=CLEANUP_S, heir=heir)
        except EngineError as error:  # what failed first says more; a collection takes the rest
            _log.warning("what a failed import brought in stays for now: %s", error)

    async def unpack(
        self,
        name: str,
        *,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        strict: bool = False,
        report: Report = silent,
    ) -> Unpacked:
        """Unpack an image for a backend (the best that works here); what exists is not redone.

        With `strict` a layer whose media type disagrees with its bytes is refused.
        """
        backend = await self._snapshotter(snapshotter)
        async with self._lease() as lease:
            return await self._unpack(name, platform, backend, lease, report, strict=strict)

    @counted(Verb.UNPACK)
    async def _unpack(
        self,
        name: str,
        platform: Platform | None,
        backend: Snapshotter,
        lease: HeldLease,
        report: Report,
        *,
        strict: bool = False,
    ) -> Unpacked:
        images = self.stores.images
        image = await trio.to_thread.run_sync(images.get, name)
        resolved = await trio.to_thread.run_sync(self.stores.resolve, image.target, platform)
        unpacked = await self._unpacker.unpack(resolved, backend, lease, report, strict=strict)
        await trio.to_thread.run_sync(images.note_use, image)
        return unpacked

    async def prepare(self, key: str, name: str, *, snapshotter: str | None = None) -> list[Mount]:
        """Make a writable root file system of an image, unpacked if need be; return its mounts.

        It stays, and keeps its image's layers, until `release`. Raises AlreadyExists for a key in use.
        """
        backend = await self._snapshotter(snapshotter)
        async with self._lease() as lease:
            unpacked = await self._unpack(name, None, backend, lease, silent)
            return await trio.to_thread.run_sync(backend.prepare, key, unpacked.chain_id)

    async def release(self, key: str, *, snapshotter: str | None = None) -> None:
        """Remove what `prepare` made under that very key.

        Raises NotFound, and FailedPrecondition while it is mounted, or if it is a layer.
        """
        await trio.to_thread.run_sync(self.stores.release, key, snapshotter)

    async def remove_image(
        self, *names: str, target: Descriptor | None = None, collect: bool = False
    ) -> Collected | None:
        """Take names away, all or none; with `collect` also what only they kept: return what that was.

        Raises NotFound, also if a name does not mean `target`, where that is given.
        """
        await trio.to_thread.run_sync(partial(self.stores.images.remove, *names, target=target))
        return await self.collect() if collect else None

    async def collect(self) -> Collected:
        """Drop and delete everything that no image, active snapshot or lease holds."""
        return await self._collect()

    async def check(
        self,
        names: Sequence[str] = (),
        *,
        repair: bool = False,
        tell: Callable[[Finding], None] = lambda _finding: None,
        report: Report = silent,
    ) -> Checked:
        """Hold the whole store, or the images of some names, against itself and its layers.

        With `repair` what can be is mended from what is there. `tell` is called with each finding, and
        like `report` from a thread.
        """
        pool = self._shop.pool
        is_over = threading.Event()

        async def applied(job: ApplyJob) -> Applied:
            async with pool.slots.slot(()):
                return await pool.apply(job, lambda _read: None)

        def apply(job: ApplyJob) -> Applied:
            return trio.from_thread.run(applied, job)

        def reported(step: Step, item: str, total: int, done: int) -> None:
            if is_over.is_set():  # the thread has to be told: it could be at it for long
                raise _Over
            report(step, item, total, done)

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                is_over.set()

        async with beside() as nursery:
            nursery.start_soon(watch)
            work = partial(
                self.stores.check, names, apply=apply if repair else None, tell=tell, report=reported
            )
            try:
                checked = await trio.to_thread.run_sync(work)
            except _Over:
                await trio.lowlevel.checkpoint()
                raise
        return checked

    def events(self) -> Listening:
        """Return what tells, as a context manager, of images, content and snapshots that change.

        That is what this process does in this namespace, told once it is durable (`docs/progress.md`).
        """
        return Listening(self.stores.root.meta, self.stores.namespace)

    def statistics(self) -> Statistics:
        """Return what this process has done to the store since it opened it, in any namespace."""
        return self.stores.root.meter.statistics(str(self.stores.root.path))

    async def _snapshotter(self, name: str | None) -> Snapshotter:
        return await trio.to_thread.run_sync(self.stores.snapshotter, name)

    @asynccontextmanager
    async def _lease(self) -> AsyncIterator[HeldLease]:
        """Hold a lease for the work of the block, which a lease of the caller's then takes over."""
        leases = self.stores.leases
        if self._heir:
            await trio.to_thread.run_sync(leases.check, self._heir)
        async with begun_lease(self.stores.root.meta, self.stores.namespace) as lease:
            yield lease
            await self._hand_over(lease)

    async def _hand_over(self, lease: HeldLease) -> None:
        """Have a lease of the caller's, if he named one, hold what one of some work does."""
        if self._heir:
            leases = self.stores.leases
            held = await trio.to_thread.run_sync(leases.members, lease.id)
            await trio.to_thread.run_sync(leases.take_over, self._heir, held)


@asynccontextmanager
async def open_engine(  # noqa: PLR0913  each is another's matter
    root: Path | str,
    *,
    namespace: str = "default",
    platform: Platform | None = None,
    create: bool = True,
    gc: Schedule | None = None,
    durability: Durability | str = Durability.FULL,
    applies: int | None = None,
    fetches: int | None = None,
    bandwidth: float | None = None,
) -> AsyncIterator[Engine]:
    """Open the store at `root`, made if need be, and close it after the block.

    With `gc` it is collected by that schedule, all of it in the background. With `durability` "lazy" the
    files of layers are left to the kernel to write: what was not when the machine went down is checked
    by the next to open the store, and unpacked anew. `applies` is how many layers are applied at once,
    by default as many as there are processors; `fetches` how many blobs, or parts of them, come at once,
    by default 12, and `bandwidth` how many bytes of them a second. Engines that a loop has on one root
    share the first's.

    Raises PermissionDenied, FailedPrecondition for a newer format, InvalidArgument for a bad root
    or bound, and without `create` NotFound where there is none.
    """
    durability = Durability(durability)
    opened = open_stores(
        Path(root),
        namespace,
        platform or host_platform(),
        create=create,
        passed=trio.from_thread.check_cancelled,
    )
    stores = await trio.to_thread.run_sync(opened.__enter__)
    try:
        shop = open_workshop(stores.root, applies, fetches, bandwidth)
        async with shop as workshop, collecting(stores, gc) as collect:
            yield Engine(stores, workshop, collect, durability)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)
