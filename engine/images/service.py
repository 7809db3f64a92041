"""The images of an engine as the CRI asks for them: pulled, listed, told, removed; what they take up.

Async. An image is listed once it can be run: pulled *and* unpacked. It stays until it is removed: when a
pull moves a name, what that meant is left under its digest, as in containerd, for who was told its ID.
"""

from typing import TYPE_CHECKING

import trio

from engine.app import Engine
from engine.images.facts import ImageFacts, ImageSizes, KnownImage
from engine.images.occupied import Occupied, occupied
from engine.kv.schema import Image
from engine.labels import GC_BREF_TARGET
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.progress import Report, silent
from engine.unpack.lease import begun_lease

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["ImageService"]


class ImageService:
    """The images of an open engine; its methods may run concurrently."""

    def __init__(self, engine: Engine, snapshotter: str | None = None) -> None:
        """`snapshotter` unpacks what is pulled, by default the best that works here."""
        self._engine = engine
        self._stores = engine.stores
        self._snapshotter = snapshotter
        self._facts = ImageFacts(engine.stores)

    async def pull(
        self, name: str, client: "Client", *, platform: Platform | None = None, report: Report = silent
    ) -> str:
        """Pull an image and unpack it; return its ID. Raises what `Engine.pull` does."""
        stores, full = self._stores, str(parse_reference(name))
        backend = await trio.to_thread.run_sync(stores.snapshotter, self._snapshotter)
        async with begun_lease(stores.root.meta, stores.namespace) as lease:
            await trio.to_thread.run_sync(stores.references.guard, lease.id, full)
            before = await trio.to_thread.run_sync(stores.images.named, full)
            pulled = await self._engine.using(lease.id).pull(
                full, client, snapshotter=backend.name, platform=platform, report=report
            )
            target = pulled.image.target
            if before and before.target.digest != target.digest:
                await trio.to_thread.run_sync(self._leave, before)
            return await trio.to_thread.run_sync(self._facts.id_of, target)

    def _leave(self, moved: Image) -> None:
        """Leave what a name meant before it moved under its digest, if that is its only name."""
        digest = moved.target.digest
        if self._facts.find(digest) is None and GC_BREF_TARGET not in moved.labels:
            reference = parse_reference(moved.name)
            self._stores.images.put_all({f"{reference.domain}/{reference.path}@{digest}": moved.target})

    async def walk(self) -> list[KnownImage]:
        """Return the images that can be run, by ID."""
        found = await trio.to_thread.run_sync(self._facts.walk)
        return [image for image in found if image.is_ready]

    async def status(self, image: str) -> KnownImage | None:
        """Return what there is to say of an image, None if there is none that can be run.

        It is meant by a name, its ID or a digest, or first digits of these. InvalidArgument.
        """
        found = await trio.to_thread.run_sync(self._facts.find, image)
        return found if found and found.is_ready else None

    async def sizes(self, image: str) -> ImageSizes:
        """Return what an image takes up. Raises NotFound, InvalidArgument."""
        return await trio.to_thread.run_sync(self._facts.sizes, image)

    async def remove(self, image: str, *, collect: bool = False) -> list[str]:
        """Take an image's names away and return them: one by that name, all by its ID or a digest.

        There may be none. What mounts, prepared roots or references hold of it stays as long as they do,
        the rest until the next collection: with `collect` it is gone when this returns.
        """
        removed = await trio.to_thread.run_sync(self._facts.remove, image)
        if collect:
            await self._engine.collect()
        return removed

    async def filesystems(self) -> list[Occupied]:
        """Return what the store takes up in each of its places: content, then each backend's."""
        return await trio.to_thread.run_sync(list, occupied(self._stores.root))
