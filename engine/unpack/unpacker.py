"""Unpacks an image: layers in parallel and out of order, commits in order.

Async. Each missing layer is a flight of its own (`engine.unpack.flights`), made while its bytes may
still be on their way (`engine.unpack.making`). Whoever needs a layer at the same place joins its flight.
When layer k fails, those below are committed, k and above are not, and its error is raised.
"""

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import trio

from engine import failpoints, labels
from engine.content.image import ResolvedImage
from engine.content.store import ContentStore
from engine.diff.apply import Applied
from engine.observing.metering import Layers
from engine.oci.digest import Digest
from engine.phases import Timings, since, total
from engine.progress import Report, Step
from engine.snapshots import Durability, Snapshotter, Usage
from engine.unpack.arrivals import Arrival
from engine.unpack.committer import has
from engine.unpack.flights import tell
from engine.unpack.layer_flight import LayerFlight
from engine.unpack.lease import HeldLease
from engine.unpack.making import Maker, Work
from engine.unpack.packing import mistyped
from engine.unpack.plan import missing_from
from engine.unpack.workshop import Workshop

__all__ = ["Unpacked", "Unpacker"]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An unpacked image: its chain ID ("" without layers), and what was done for it."""

    chain_id: str
    layers: int
    applied: int
    entries: int
    bytes_unpacked: int
    xattrs_left_out: int
    mistyped: tuple[str, ...]
    """A line for each layer applied whose bytes are packed in another way than its media type says."""
    timings: Timings = field(default_factory=dict, compare=False)
    """Where the time went; commits and flushes of what others unpacked meanwhile are among it."""
    reused: int = 0
    """How many layers were not applied, as their data was here from another base."""


class Unpacker:
    """Unpacks images of one namespace; each layer once, however many ask for it."""

    def __init__(
        self,
        root: Path,
        namespace: str,
        content: ContentStore,
        workshop: Workshop,
        durability: Durability = Durability.FULL,
    ) -> None:
        self._is_durable = durability is Durability.FULL
        self._namespace = namespace
        self._content = content
        self._shop = workshop
        self._maker = Maker(root, namespace, content, workshop)
        self._asked = count()

    def unpack(
        self,
        image: ResolvedImage,
        snapshotter: Snapshotter,
        lease: HeldLease,
        report: Report,
        *,
        strict: bool = False,
        arrivals: Mapping[Digest, Arrival] | None = None,
    ) -> Awaitable[Unpacked]:
        """Unpack what is missing of `image` and anchor it to the image's config.

        Everything made or found is pinned by `lease`. With `strict` a layer whose media type disagrees
        with its bytes is refused, unpacked already or not; else the bytes decide. `arrivals` are its
        layers on their way in; without, all are here. Raises Refused for a bad layer, NotFound where
        a blob is missing, ResourceExhausted and others, and what an arrival fails with.

        What there is to do is told at once, before anyone can fetch some of it.
        """
        for layer in image.layers:
            tell(report, Step.PLACE, layer.descriptor.digest, layer.descriptor.size, 0)
        return self._unpack(image, snapshotter, lease, report, arrivals, strict=strict)

    async def _unpack(
        self,
        image: ResolvedImage,
        snapshotter: Snapshotter,
        lease: HeldLease,
        report: Report,
        arrivals: Mapping[Digest, Arrival] | None,
        *,
        strict: bool,
    ) -> Unpacked:
        chain = image.chain
        snapshotter.capabilities.check_layers(snapshotter.name, len(chain))
        pinned = partial(has, snapshotter, lease.id)
        first = await trio.to_thread.run_sync(missing_from, chain, pinned)
        if arrivals is None:
            arrivals = await trio.to_thread.run_sync(self._pin, image, first, lease)
        sealing_took = self._shop.pool.sealing_took
        if strict:
            await self._odd(image, arrivals, strict=True)
        made = await self._layers(image, first, snapshotter, lease, report, arrivals)
        if self._is_durable:  # what was found, or made for others, may not be
            await trio.to_thread.run_sync(snapshotter.flush)
        odd = await self._odd(image, arrivals)
        reused = sum(1 for one in made if one is not None and one.is_reused)
        top = chain[-1] if chain else ""
        if top:
            await trio.to_thread.run_sync(self._anchor, image, snapshotter, top)
        applied = [one for one in made if one is not None and not one.is_reused]
        sealing = since(sealing_took, self._shop.pool.sealing_took)
        return Unpacked(
            chain_id=top,
            layers=len(chain),
            applied=len(applied),
            entries=sum(one.entries for one in applied),
            bytes_unpacked=sum(one.bytes_unpacked for one in applied),
            xattrs_left_out=sum(one.xattrs_left_out for one in applied),
            mistyped=odd,
            timings=total(*(one.timings for one in applied), sealing),
            reused=reused,
        )

    def _pin(self, image: ResolvedImage, first: int, lease: HeldLease) -> Mapping[Digest, Arrival]:
        # The config gets the anchor in the end, so it must still be there then.
        needed = [image.manifest.config.key, *(x.descriptor.key for x in image.layers[first:])]
        blobs = self._content.pin(needed, lease.id)
        return dict(zip(needed, map(Arrival, blobs), strict=True))

    async def _odd(
        self, image: ResolvedImage, arrivals: Mapping[Digest, Arrival], *, strict: bool = False
    ) -> tuple[str, ...]:
        for arrival in arrivals.values():
            await arrival.whole()
        look = partial(mistyped, image.layers, self._content, strict=strict)
        return await trio.to_thread.run_sync(look)

    async def _layers(
        self,
        image: ResolvedImage,
        first: int,
        snapshotter: Snapshotter,
        lease: HeldLease,
        report: Report,
        arrivals: Mapping[Digest, Arrival],
    ) -> list[Applied | None]:
        """Make the layers from position `first` on; return what came of each, None if made elsewhere."""
        chain, asked = image.chain, next(self._asked)
        standing = await trio.to_thread.run_sync(_usage, snapshotter, chain[:first])
        self._shop.meter.had(Layers.FOUND, first)
        done = _Done(image, report)
        for position in range(first):
            done.tell(position)
        made: list[Applied | None] = []
        async with self._shop.flights.caller(report) as join:
            # Bottom first: whoever joins one has joined all below.
            flights: list[LayerFlight] = []
            for position in range(first, len(chain)):
                layer = image.layers[position]
                work = Work(
                    layer=layer,
                    arrival=arrivals[layer.descriptor.key],
                    chain_id=chain[position],
                    parent=chain[position - 1] if position else "",
                    snapshotter=snapshotter,
                    below=flights[-1] if flights else None,
                    standing=standing,
                    lease=lease,
                    order=(asked, position),
                    flush=self._is_durable,
                )
                # By its blob, too: an image that lies about what is in it fails alone.
                key = (self._namespace, snapshotter.name, work.chain_id, layer.descriptor.digest)
                flights.append(join(key, partial(self._layer, work)))
            for position, flight in enumerate(flights, first):
                made.append(await flight.result())
                if flight.lease is not lease:
                    await trio.to_thread.run_sync(has, snapshotter, lease.id, chain[position])
                done.tell(position)
        return made

    def _anchor(self, image: ResolvedImage, snapshotter: Snapshotter, top: str) -> None:
        self._content.update(image.manifest.config.key, {labels.snapshot_ref(snapshotter.name): top})
        failpoints.hit("unpack.anchored")

    def _layer(self, work: Work, flight: LayerFlight) -> AbstractAsyncContextManager[Applied | None]:
        """Make a layer's snapshot in the block to come, and keep it as long as that lasts.

        The lease is held from now on: whoever began it may have left before the block is entered.
        """
        flight.item, flight.lease = work.layer.descriptor.digest, work.lease
        if work.snapshotter.capabilities.shares:
            flight.twin = self._shop.twins.begin(self._layer_of(work), flight)
        return self._kept(work, flight, work.lease.hold())

    def _layer_of(self, work: Work) -> tuple[str, ...]:
        # By its blob, too: that of an image that lies would not be looked at (M-11).
        blob = work.layer.descriptor.digest
        return (self._namespace, work.snapshotter.name, work.layer.diff_id, blob)

    @asynccontextmanager
    async def _kept(
        self, work: Work, flight: LayerFlight, held: AbstractAsyncContextManager[HeldLease]
    ) -> AsyncIterator[Applied | None]:
        try:
            async with held:
                yield await self._maker.make(work, flight)
        finally:
            flight.is_ready.set()
            self._shop.twins.end(self._layer_of(work), flight)


class _Done:
    """Tells of each blob of an image when the last layer that is made of it is done."""

    def __init__(self, image: ResolvedImage, report: Report) -> None:
        self._layers = [layer.descriptor for layer in image.layers]
        self._last = {layer.digest: position for position, layer in enumerate(self._layers)}
        self._report = report

    def tell(self, position: int) -> None:
        layer = self._layers[position]
        if self._last[layer.digest] == position:
            tell(self._report, Step.DONE, layer.digest, layer.size, layer.size)


def _usage(snapshotter: Snapshotter, chain: Sequence[str]) -> Usage:
    parts = [snapshotter.usage(name) for name in chain]
    return Usage(sum(part.size for part in parts), sum(part.inodes for part in parts))
