"""One pull, from a name to an image: resolved, fetched, unpacked meanwhile, and named at last.

Async.
"""

from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from engine.content.image import ResolvedImage, resolve
from engine.content.keeping import kept_documents
from engine.errors import EngineError, NotFound
from engine.failpoints import hit
from engine.fs.room import Room
from engine.kv.schema import Image
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.oci.reference import Reference
from engine.progress import Report
from engine.registry.fetching import Fetcher, Sought
from engine.snapshots import Snapshotter
from engine.stores import Stores
from engine.unpack.arrivals import Arrival, Arrivals
from engine.unpack.lease import HeldLease
from engine.unpack.unpacker import Unpacked, Unpacker

if TYPE_CHECKING:
    from engine.registry.client import Client

__all__ = ["Pulled", "Pulling"]

_AT_ONCE = 4  # layers of one image; those above need not wait for one that is large


@dataclass(frozen=True, slots=True)
class Pulled:
    """An image that was pulled, and what was done to unpack it, if it was to be."""

    image: Image
    unpacked: Unpacked | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulling:
    """How to pull: what, for which platform, the backend to unpack for and how."""

    stores: Stores
    unpacker: Unpacker
    arrivals: Arrivals
    client: "Client"
    reference: Reference
    platform: Platform
    backend: Snapshotter | None
    strict: bool
    lasting: bool
    report: Report

    async def run(self, lease: HeldLease) -> Pulled:
        """Pull. What failed stays for a while, so that the next attempt goes on with it."""
        stores = self.stores
        found = await self.client.resolve(self.reference)
        documents = {found.descriptor.key: found.data} if found.data is not None else {}
        read = partial(self._read, documents, lease.id)
        image = await trio.to_thread.run_sync(resolve, found.descriptor, self.platform, read)
        if self.backend:
            self.backend.capabilities.check_layers(self.backend.name, len(image.layers))
        fetcher = Fetcher(self.client, stores.content, stores.root.trash)
        store = partial(self._store, fetcher, documents, lease.id)
        await store(image.manifest.config, {})
        unpacked = await self._layers(image, fetcher, lease)
        for document, about in kept_documents(image):
            await store(document, about)
        hit("pull.labelled")
        named = {str(self.reference): found.descriptor}
        put = partial(stores.images.put_all, named, replace=True, lasting=self.lasting)
        (put_image,) = await trio.to_thread.run_sync(put)
        hit("pull.named")
        return Pulled(put_image, unpacked)

    # -- documents ----------------------------------------------------------------------------

    def _read(
        self, documents: dict[Digest, bytes], lease: str, descriptor: Descriptor, limit: int
    ) -> bytes:
        """Return a document from the store, pinned, or from the registry; for a thread."""
        digest, content = descriptor.key, self.stores.content
        if digest in documents:
            return documents[digest]
        try:
            content.info(digest, lease=lease)
            return content.read_all(digest, limit)
        except NotFound:
            fetched = trio.from_thread.run(self.client.document, self.reference, descriptor, limit)
        documents[digest] = fetched
        return fetched

    async def _store(
        self,
        fetcher: Fetcher,
        documents: Mapping[Digest, bytes],
        lease: str,
        descriptor: Descriptor,
        about: dict[str, str],
    ) -> None:
        await fetcher.fetch(
            Sought(
                reference=self.reference,
                descriptor=descriptor,
                lease=lease,
                labels=about,
                data=documents.get(descriptor.key),
            )
        )

    # -- layers -------------------------------------------------------------------------------

    async def _layers(self, image: ResolvedImage, fetcher: Fetcher, lease: HeldLease) -> Unpacked | None:
        """Fetch the layers, and unpack them while they come.

        What cannot be unpacked is fetched no further. Where fetching fails, layers below are unpacked
        as far as they are there.
        """
        layers = {layer.descriptor.key: layer.descriptor for layer in image.layers}
        await trio.to_thread.run_sync(self._make_room, layers.values())
        done: list[Unpacked] = []
        failed: list[EngineError] = []

        async def ending(work: Awaitable[Unpacked | None]) -> None:
            try:
                if unpacked := await work:
                    done.append(unpacked)
            except EngineError as error:
                failed.append(error)
                fetching.cancel_scope.cancel()

        async with trio.open_nursery() as unpacking:
            try:
                with self.arrivals.bringing(self.stores.namespace, layers) as coming:
                    async with trio.open_nursery() as fetching:
                        if self.backend:
                            work = self.unpacker.unpack(
                                image,
                                self.backend,
                                lease,
                                self.report,
                                strict=self.strict,
                                arrivals=coming,
                            )
                            unpacking.start_soon(ending, work)
                        left = iter(layers.values())  # shared: bottom first, each once
                        for _ in range(_AT_ONCE):
                            fetching.start_soon(ending, self._fetch(fetcher, left, coming, lease.id))
                    if failed:
                        raise failed[0]  # to all who follow what came
            except EngineError:
                pass
        if failed:
            raise failed[0]
        return done[0] if done else None

    async def _fetch(
        self,
        fetcher: Fetcher,
        left: Iterator[Descriptor],
        coming: Mapping[Digest, Arrival],
        lease: str,
    ) -> None:
        for descriptor in left:
            await fetcher.fetch(
                Sought(
                    reference=self.reference,
                    descriptor=descriptor,
                    lease=lease,
                    arrival=coming[descriptor.key],
                    report=self.report,
                )
            )

    def _make_room(self, layers: Iterable[Descriptor]) -> None:
        """Find out before the first byte whether there is space for the last."""
        content = self.stores.content
        missing = 0
        for layer in layers:
            try:
                content.info(layer.key)
            except NotFound:
                missing += layer.size
        if growth := content.growth(missing):
            Room(self.stores.root.trash).take(growth)
