"""One pull, from a name to an image: resolved, fetched, unpacked meanwhile, and named at last.

Async.
"""

from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from engine import labels, limits
from engine.content.closure import closure
from engine.content.image import ResolvedImage, resolve
from engine.content.keeping import kept_documents, kept_of_all
from engine.content.present import present
from engine.errors import EngineError, InvalidArgument, NotFound, Refused
from engine.failpoints import hit
from engine.fs.room import Room
from engine.kv.schema import Image, now
from engine.observing.counting import bringing_in
from engine.observing.metering import Moved
from engine.observing.tally import Tally, both
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.mediatypes import INDEXES, MANIFESTS
from engine.oci.platform import Platform
from engine.oci.reference import Reference
from engine.phases import Timings, total
from engine.progress import Report, Step
from engine.registry.credentials import mark
from engine.registry.fetching import Fetcher, Sought
from engine.registry.lanes import Lanes
from engine.snapshots import Snapshotter
from engine.stores import Stores
from engine.times import rfc3339
from engine.unpack.arrivals import Arrival, Arrivals
from engine.unpack.committer import has
from engine.unpack.lease import HeldLease
from engine.unpack.plan import missing_from
from engine.unpack.unpacker import Unpacked, Unpacker

if TYPE_CHECKING:
    from engine.registry.client import Client, Found

__all__ = ["PullWanted", "Pulled", "Pulling"]

_AT_ONCE = limits.FETCHES_OF_IMAGE  # those above need not wait for one that is large


@dataclass(frozen=True, slots=True)
class Pulled:
    """An image that was pulled, and what was done to unpack it, if it was to be."""

    image: Image
    unpacked: Unpacked | None
    timings: Timings = field(default_factory=dict, compare=False)
    """Where the time went, of unpacking too; what comes over the network is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullWanted:
    """What to pull, and what to make of it; pulls that want the same are one."""

    reference: Reference
    platform: Platform
    backend: str | None
    all_platforms: bool = False
    keep_blobs: bool = True
    strict: bool = False
    lasting: bool = True

    @property
    def key(self) -> bytes:
        """What tells it from others."""
        return msgspec.json.encode(self)

    def check(self) -> None:
        """Raise InvalidArgument for what nobody could want."""
        if not self.keep_blobs and not self.backend:
            raise InvalidArgument("without its blobs an image has to be unpacked; name a snapshotter")


@dataclass(slots=True, kw_only=True)
class Pulling:
    """A pull under way: what is wanted, where from, and what it works with."""

    stores: Stores
    unpacker: Unpacker
    arrivals: Arrivals
    client: "Client"
    lanes: Lanes
    wanted: PullWanted
    backend: Snapshotter | None
    applies: int
    """How many layers are applied at once."""
    report: Report
    _documents: dict[Digest, bytes] = field(init=False, default_factory=dict)
    _lease: str = field(init=False, default="")
    _tally: Tally = field(init=False, default_factory=Tally)
    _fetcher: Fetcher = field(init=False)
    _large: trio.CapacityLimiter = field(init=False)

    def __post_init__(self) -> None:
        # More of them would come slower each, and wait for a place then: the last byte would come no
        # sooner, and the last but one later.
        self._large = trio.CapacityLimiter(self.applies)
        content, folder = self.stores.content, self.stores.root.trash
        self._fetcher = Fetcher(self.client, content, folder, self.lanes)

    async def run(self, lease: HeldLease) -> Pulled:
        """Pull. What failed stays for a day, so that the next attempt goes on with it.

        `lease` holds what is unpacked, and in the end the image.
        """
        pulls, name = self.stores.pulls, str(self.wanted.reference)
        self._lease = await trio.to_thread.run_sync(pulls.begin, name)
        meter = self.stores.root.meter
        try:
            with bringing_in(meter, Moved.FETCHED) as self._tally:
                return await self._run(lease)
        finally:
            meter.spent(self._fetcher.timings)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(pulls.leave, self._lease)

    async def _run(self, lease: HeldLease) -> Pulled:
        wanted, pulls = self.wanted, self.stores.pulls
        found = await self.client.resolve(wanted.reference)
        target = found.descriptor
        if found.data is not None:
            self._documents[target.key] = found.data
        await trio.to_thread.run_sync(pulls.note, self._lease, target)
        hit("pull.resolved")
        image = await trio.to_thread.run_sync(resolve, target, wanted.platform, self._read)
        if self.backend:
            self.backend.capabilities.check_layers(self.backend.name, len(image.layers))
        documents, others = await trio.to_thread.run_sync(self._to_keep, target, image)
        # What they keep is noted once it is here: until then they only tell how far the image is.
        for document in (image.manifest.config, *(one for one, _ in documents)):
            await self._store(document)
        own = {one.key: one for one in await self._own_layers(image, lease)}
        layers = own | {one.key: one for one in others if one.key not in own}
        unpacked = await self._layers(image, layers, lease)
        changes = {document.key: about for document, about in documents}
        changes[target.key] |= await trio.to_thread.run_sync(self._pullers, found)
        await trio.to_thread.run_sync(self.stores.content.update_all, changes)
        hit("pull.labelled")
        finish = partial(
            pulls.finish,
            self._lease,
            str(wanted.reference),
            target,
            heir=lease.id,
            lasting=wanted.lasting,
        )
        put_image = await trio.to_thread.run_sync(finish)
        hit("pull.named")
        timings = total(self._fetcher.timings, unpacked.timings if unpacked else {})
        return Pulled(put_image, unpacked, timings)

    # -- documents ----------------------------------------------------------------------------

    def _to_keep(
        self, target: Descriptor, image: ResolvedImage
    ) -> tuple[list[tuple[Descriptor, dict[str, str]]], Sequence[Descriptor]]:
        """Return the documents to store, with what they are to keep, and the blobs which that is.

        Those of one platform alone are its own, told by `_own_layers`.
        """
        keep = self.wanted.keep_blobs
        if not self.wanted.all_platforms:
            return list(kept_documents(image.path, image.manifest, layers=keep)), ()
        found = closure([target], self._read)
        for absent in found.missing:
            raise NotFound(f"{self.wanted.reference} lists {absent}, which is not there")
        present(target, self.wanted.platform, self._read, lambda _: True)  # refuses what breaks a rule
        kept = kept_of_all(found, but_layers_of=None if keep else image.manifest)
        # Also layers that are shared: another platform keeps what this one lets go of.
        named = {digest for _, about in kept for digest in about.values()}
        named.discard(image.manifest.config.digest)
        return kept, [blob for blob in found.blobs.values() if blob.digest in named]

    def _pullers(self, found: "Found") -> dict[str, str]:
        """Return the labels that note who asked, in place of the oldest if those are too many."""
        target = found.descriptor.key
        mine = labels.PULLED_WITH + mark(found.credential, target)
        about = self.stores.content.info(target).labels
        others = [key for key in about if key.startswith(labels.PULLED_WITH) and key != mine]
        oldest_last = sorted(others, key=lambda key: about[key], reverse=True)
        return {mine: rfc3339(now()), **dict.fromkeys(oldest_last[limits.PULLERS - 1 :], "")}

    def _read(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a document from the store, pinned, or from the registry; for a thread."""
        digest, content = descriptor.key, self.stores.content
        if digest in self._documents:
            return self._documents[digest]
        if descriptor.size > limit:
            raise Refused(f"{digest} has {descriptor.size} bytes, too many for its kind")
        if descriptor.media_type not in INDEXES | MANIFESTS:
            trio.from_thread.run(self._store, descriptor)
        try:
            content.info(digest, lease=self._lease)
            return content.read_all(digest, limit)
        except NotFound:
            reading = partial(self.client.document, self.wanted.reference, descriptor, limit)
            self._documents[digest] = trio.from_thread.run(reading)
        return self._documents[digest]

    async def _store(self, descriptor: Descriptor) -> None:
        sought = Sought(
            reference=self.wanted.reference,
            descriptor=descriptor,
            lease=self._lease,
            data=self._documents.get(descriptor.key),
        )
        await self._fetcher.fetch(sought)

    # -- layers -------------------------------------------------------------------------------

    async def _own_layers(self, image: ResolvedImage, lease: HeldLease) -> Sequence[Descriptor]:
        """Return the layers to have in the store, bottom first; what need not stay is not fetched."""
        first = 0
        if not self.wanted.keep_blobs and self.backend:
            pinned = partial(has, self.backend, lease.id)
            first = await trio.to_thread.run_sync(missing_from, image.chain, pinned)
        return image.manifest.layers[first:]

    async def _layers(
        self,
        image: ResolvedImage,
        layers: Mapping[Digest, Descriptor],
        lease: HeldLease,
    ) -> Unpacked | None:
        """Fetch layers, and unpack those of the image while they come.

        What cannot be unpacked is fetched no further. Where fetching fails, layers below are unpacked
        as far as they are there.
        """
        await trio.to_thread.run_sync(self._make_room, layers.values())
        for layer in layers.values():
            self.report(Step.FETCH, layer.digest, layer.size, 0)
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
                                strict=self.wanted.strict,
                                arrivals=coming,
                            )
                            unpacking.start_soon(ending, work)
                        left = iter(layers.values())  # shared: bottom first, each once
                        for _ in range(_AT_ONCE):
                            fetching.start_soon(ending, self._fetch(left, coming))
                    if failed:
                        raise failed[0]  # to all who follow what came
            except EngineError:
                pass
        if failed:
            raise failed[0]
        return done[0] if done else None

    async def _fetch(self, left: Iterator[Descriptor], coming: Mapping[Digest, Arrival]) -> None:
        for descriptor in left:
            sought = Sought(
                reference=self.wanted.reference,
                descriptor=descriptor,
                lease=self._lease,
                arrival=coming[descriptor.key],
                report=both(self._tally, self.report),
            )
            is_large = descriptor.size > limits.RANGES_FROM
            async with self._large if is_large else nullcontext():
                await self._fetcher.fetch(sought)

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
