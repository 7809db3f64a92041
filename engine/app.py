"""The engine in process: what a container runtime links in.

Async. Slow work runs on threads and in worker processes; every operation holds a lease for what it
makes or finds until that is anchored.
"""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from engine.archive.importer import Imported, import_images
from engine.content.image import ResolvedImage
from engine.errors import EngineError, InvalidArgument
from engine.failpoints import hit
from engine.gc.collect import Collected
from engine.kv.schema import Image
from engine.mount import Mount
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.progress import Report, Step, silent
from engine.snapshots import Snapshotter
from engine.stores import Stores, host_platform, open_stores
from engine.unpack.lease import HeldLease, begun_lease
from engine.unpack.unpacker import CLEANUP_S, Unpacked, Unpacker
from engine.unpack.workshop import Workshop, open_workshop

__all__ = ["Engine", "open_engine"]


_log = logging.getLogger(__name__)


class Engine:
    """An open engine; get one from `open_engine`. Its methods may run concurrently."""

    def __init__(self, stores: Stores, workshop: Workshop) -> None:
        self.stores = stores
        self._unpacker = Unpacker(stores.root.path, stores.namespace, stores.content, workshop)

    async def import_image(
        self,
        path: Path | str,
        *,
        name: str | None = None,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        replace: bool = False,
        report: Report = silent,
    ) -> list[Image]:
        """Import the images of an OCI layout, an OCI archive or a docker archive; return them.

        With `snapshotter` they are also unpacked, before they get their names: an image that cannot
        be unpacked leaves nothing behind. `name` is for a source of one image; `replace` lets a name
        move. Raises Refused, NotFound, AlreadyExists and others (`engine.errors`).
        """
        platform = platform or self.stores.platform
        async with self._lease() as lease:
            try:
                found = await trio.to_thread.run_sync(
                    partial(
                        import_images,
                        Path(path),
                        self.stores.content,
                        platform=platform,
                        spool=self.stores.root.trash,
                        lease=lease.id,
                        report=_cancellable(report),
                    )
                )
                targets = _named(found, name)
                if snapshotter:
                    backend = await self._snapshotter(snapshotter)
                    for imported in found:
                        await self._unpacker.unpack(imported.image, backend, lease, report)
                return await trio.to_thread.run_sync(self._put, targets, replace)
            except BaseException:
                if lease.is_last:  # else another caller works with what this one began
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._give_up, lease.id)
                raise

    def _put(self, targets: Mapping[str, Descriptor], replace: bool) -> list[Image]:
        images = self.stores.images.put_all(targets, replace=replace)
        hit("import.named")
        return images

    def _give_up(self, lease: str) -> None:
        try:
            self.stores.give_up(lease, seconds=CLEANUP_S)
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
            image = await trio.to_thread.run_sync(self._resolve, name, platform)
            return await self._unpacker.unpack(image, backend, lease, report, strict=strict)

    def _resolve(self, name: str, platform: Platform | None) -> ResolvedImage:
        return self.stores.resolve(self.stores.images.get(name).target, platform)

    async def prepare(self, key: str, name: str, *, snapshotter: str | None = None) -> list[Mount]:
        """Make a writable root file system of an image, unpacked if need be; return its mounts.

        It stays, and keeps its image's layers, until `release`. Raises AlreadyExists for a key in use.
        """
        backend = await self._snapshotter(snapshotter)
        async with self._lease() as lease:
            image = await trio.to_thread.run_sync(self._resolve, name, None)
            unpacked = await self._unpacker.unpack(image, backend, lease, silent)
            return await trio.to_thread.run_sync(backend.prepare, key, unpacked.chain_id)

    async def release(self, key: str, *, snapshotter: str | None = None) -> None:
        """Remove what `prepare` made. Raises NotFound, and FailedPrecondition while it is mounted."""
        await trio.to_thread.run_sync(self.stores.release, key, snapshotter)

    async def collect(self) -> Collected:
        """Drop and delete everything that no image, active snapshot or lease holds."""
        return await trio.to_thread.run_sync(self.stores.collect)

    async def _snapshotter(self, name: str | None) -> Snapshotter:
        return await trio.to_thread.run_sync(self.stores.snapshotter, name)

    def _lease(self) -> AbstractAsyncContextManager[HeldLease]:
        return begun_lease(self.stores.root.meta, self.stores.namespace)


def _named(found: Sequence[Imported], name: str | None) -> dict[str, Descriptor]:
    """Return what each name shall mean. InvalidArgument where two images would share one."""
    if name and len(found) > 1:
        raise InvalidArgument(f"the archive holds {len(found)} images; import it without a name")
    targets: dict[str, Descriptor] = {}
    for imported in found:
        for label in [name] if name else imported.names:
            if targets.setdefault(label, imported.target).digest != imported.target.digest:
                raise InvalidArgument(f"the archive has two images for the name {label}")
    return targets


def _cancellable(report: Report) -> Report:
    """Return a report that also ends work on a thread once its task is cancelled."""

    def check(step: Step, item: str, total: int, done: int, /) -> None:
        trio.from_thread.check_cancelled()
        report(step, item, total, done)

    return check


@asynccontextmanager
async def open_engine(
    root: Path | str,
    *,
    namespace: str = "default",
    platform: Platform | None = None,
    create: bool = True,
) -> AsyncIterator[Engine]:
    """Open the store at `root`, made if need be, and close it after the block.

    Raises PermissionDenied, FailedPrecondition for a newer format, InvalidArgument for a bad root,
    and without `create` NotFound where there is none.
    """
    opened = open_stores(Path(root), namespace, platform or host_platform(), create=create)
    stores = await trio.to_thread.run_sync(opened.__enter__)
    try:
        async with open_workshop(stores.root) as workshop:
            yield Engine(stores, workshop)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)
