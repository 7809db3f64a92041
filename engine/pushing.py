"""One push, from an image that is here to a registry that then has it.

Async; threads read. What is to go is pinned first, so that it stays until all of it is there.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from engine.content.closure import Closure, closure
from engine.content.image import resolve
from engine.content.reader import Reader
from engine.errors import FailedPrecondition, NotFound
from engine.kv.schema import EXTENT, Blob, Image
from engine.labels import sources, with_source
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.mediatypes import is_distributable
from engine.oci.platform import Platform
from engine.oci.reference import Reference, familiar, parse_reference
from engine.progress import Report
from engine.registry.lanes import Lanes
from engine.registry.sending import Pushed, Sending, check_named
from engine.stores import Stores

if TYPE_CHECKING:
    from engine.registry.client import Client

__all__ = ["Pushing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushing:
    """How to push: what, by which name (its own unless given), one platform of it or all."""

    stores: Stores
    client: "Client"
    lanes: Lanes
    name: str
    reference: Reference | None
    platform: Platform | None
    report: Report

    async def run(self, lease: str) -> Pushed:
        """Push. Nothing is named in the registry before all of it is there."""
        image, root, found = await trio.to_thread.run_sync(self._found)
        reference = self.reference or parse_reference(image.name)
        check_named(reference, root)
        blobs = await trio.to_thread.run_sync(self._pinned, found, image, lease)
        sending = Sending(
            client=self.client,
            lanes=self.lanes.of_image(),
            reference=reference,
            read=self._read,
            elsewhere=lambda blob: sources(blobs[blob.key].labels, reference.domain),
            report=self.report,
        )
        pushed = await sending.run(root, found)
        await trio.to_thread.run_sync(self._note, reference, pushed, blobs)
        await trio.to_thread.run_sync(self.stores.images.note_use, image)
        return pushed

    def _found(self) -> tuple[Image, Descriptor, Closure]:
        """Return what is to go, all of which has to be here."""
        stores = self.stores
        image = stores.images.get(self.name)
        root = image.target
        if self.platform:
            root = resolve(root, self.platform, self._document, chosen=True).path[-1]
        found = closure([root], self._document)
        if found.missing:
            absent = sorted({str(one.platform or one.digest) for one in found.missing.values()})
            raise FailedPrecondition(
                f"{familiar(image.name)} has parts that are not here, {', '.join(absent[:5])}"
                f"{', …' if len(absent) > 5 else ''}; push one platform of it (--platform), "
                "or pull all first (--all-platforms)"
            )
        return image, root, found

    def _document(self, descriptor: Descriptor, limit: int) -> bytes:
        return self.stores.content.read_all(descriptor.key, limit)

    def _pinned(self, found: Closure, image: Image, lease: str) -> dict[Digest, Blob]:
        """Pin what is to go, in one step; return the records."""
        blobs = [key for key, one in found.blobs.items() if is_distributable(one.media_type)]
        try:
            records = self.stores.content.pin([*found.documents, *blobs], lease)
        except NotFound as error:
            raise FailedPrecondition(
                f"{familiar(image.name)} is not here whole ({error}), its layers may have been dropped "
                "once unpacked; pull it again with --keep-blobs"
            ) from None
        return {Digest(record.digest): record for record in records}

    def _note(self, reference: Reference, pushed: Pushed, blobs: dict[Digest, Blob]) -> None:
        """Note where the blobs are now, so that another repository there need not be sent them."""
        changes = {
            key: with_source(blob.labels, reference.domain, reference.path)
            for key, blob in blobs.items()
            if key in pushed.ways
        }
        self.stores.content.update_all({key: labels for key, labels in changes.items() if labels})

    @asynccontextmanager
    async def _read(self, descriptor: Descriptor, offset: int) -> AsyncIterator["_StoredBody"]:
        reader = await trio.to_thread.run_sync(self.stores.content.open, descriptor.key)
        try:
            yield _StoredBody(reader, offset)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(reader.close)


class _StoredBody:
    """A blob from a byte on, an extent at a time, so that no transaction waits for the network."""

    def __init__(self, reader: Reader, offset: int) -> None:
        self._reader = reader
        self._offset = offset

    async def read(self) -> bytes:
        """Return some more bytes, none at the end."""
        size = EXTENT - self._offset % EXTENT
        data = await trio.to_thread.run_sync(partial(self._reader.read_at, self._offset, size))
        self._offset += len(data)
        return data
