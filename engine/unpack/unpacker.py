"""Unpacks an image: layers in parallel and out of order, commits in order.

Async. Each missing layer is a flight of its own (`engine.unpack.flights`): applied by a worker into an
active snapshot, then committed once all below it are. Whoever needs a layer at the same place joins its
flight. When layer k fails, those below are committed, k and above are not, and its error is raised.
Whatever happens, no active snapshot stays.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from engine import failpoints, labels, limits
from engine.content.image import Layer, ResolvedImage
from engine.content.store import ContentStore
from engine.diff.apply import Applied
from engine.errors import DigestMismatch, EngineError, NotFound, Refused
from engine.kv.environment import Environment
from engine.metadata.leases import leased
from engine.oci.identity import ChainID
from engine.progress import Report, Step
from engine.snapshots import Commit, Snapshotter
from engine.unpack.flights import Flight, Flights
from engine.unpack.jobs import ApplyJob
from engine.unpack.plan import missing_from
from engine.unpack.pool import WorkerPool
from engine.unpack.sealer import Sealer, has

__all__ = ["Unpacked", "Unpacker", "held_lease"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An unpacked image: its chain ID ("" without layers), and what was done for it."""

    chain_id: str
    layers: int
    applied: int
    entries: int
    bytes_unpacked: int
    xattrs_left_out: int


@dataclass(frozen=True, slots=True)
class _Work:
    """One layer to be made a committed snapshot."""

    layer: Layer
    chain_id: ChainID
    parent: str
    snapshotter: Snapshotter
    below: "_LayerFlight | None"

    def commit(self, key: str, lease: str) -> Commit:
        about = {
            labels.SNAPSHOT_REF: str(self.chain_id),
            labels.DIFF_ID: str(self.layer.diff_id),
        }
        if self.parent:
            about[labels.PARENT_CHAIN_ID] = self.parent
        parent = self.parent or None
        return Commit(name=self.chain_id, key=key, parent=parent, lease=lease, labels=about)


class _LayerFlight(Flight[Applied]):
    """A layer under way. The one above waits for both events: so layers are queued bottom first, as
    what is committed first should not be applied last, and reach the sealer in chain order."""

    def __init__(self) -> None:
        super().__init__()
        self.is_queued = trio.Event()
        self.is_ready = trio.Event()


@asynccontextmanager
async def held_lease(meta: Environment, namespace: str) -> AsyncIterator[str]:
    """Hold a lease of this process for the length of a block; give its ID."""
    held = leased(meta, namespace)
    lease = await trio.to_thread.run_sync(held.__enter__)
    try:
        yield lease
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(held.__exit__, None, None, None)


class Unpacker:
    """Unpacks images of one namespace; each layer once, however many ask for it."""

    def __init__(
        self, root: Path, meta: Environment, namespace: str, content: ContentStore, pool: WorkerPool
    ) -> None:
        self._root = root
        self._meta = meta
        self._namespace = namespace
        self._content = content
        self._pool = pool
        self._flights = Flights(_LayerFlight)
        self._sealers: dict[str, Sealer] = {}

    async def unpack(
        self, image: ResolvedImage, snapshotter: Snapshotter, lease: str, report: Report
    ) -> Unpacked:
        """Unpack what is missing of `image` and anchor it to the image's config.

        Everything made or found is pinned by `lease`. Raises Refused for a bad layer, NotFound where a
        blob is missing, ResourceExhausted and others.
        """
        chain = image.chain
        config = image.manifest.config.key
        # It gets the anchor in the end, so it must still be there then.
        await trio.to_thread.run_sync(partial(self._content.info, config, lease=lease))
        first = await trio.to_thread.run_sync(missing_from, chain, partial(has, snapshotter, lease))
        applied: list[Applied] = []
        async with AsyncExitStack() as joined:
            flights = await self._join(joined, image, first, snapshotter, report)
            for flight, name in zip(flights, chain[first:], strict=True):
                applied.append(await flight.result())
                await trio.to_thread.run_sync(has, snapshotter, lease, name)
                _check_image(applied)
        top = chain[-1] if chain else ""
        if top:
            anchor = {labels.snapshot_ref(snapshotter.name): top}
            await trio.to_thread.run_sync(self._content.update, config, anchor)
            failpoints.hit("unpack.anchored")
        return Unpacked(
            chain_id=top,
            layers=len(chain),
            applied=len(applied),
            entries=sum(one.entries for one in applied),
            bytes_unpacked=sum(one.bytes_unpacked for one in applied),
            xattrs_left_out=sum(one.xattrs_left_out for one in applied),
        )

    async def _join(
        self,
        joined: AsyncExitStack,
        image: ResolvedImage,
        first: int,
        snapshotter: Snapshotter,
        report: Report,
    ) -> list[_LayerFlight]:
        """Join the flights of the missing layers, bottom first: who joins one has joined all below."""
        flights: list[_LayerFlight] = []
        chain = image.chain
        for position, layer in list(enumerate(image.layers))[first:]:
            work = _Work(
                layer=layer,
                chain_id=chain[position],
                parent=chain[position - 1] if position else "",
                snapshotter=snapshotter,
                below=flights[-1] if flights else None,
            )
            key = (snapshotter.name, work.chain_id)
            flight = self._flights.joined(key, partial(self._layer, work), report)
            flights.append(await joined.enter_async_context(flight))
        return flights

    @asynccontextmanager
    async def _layer(self, work: _Work, flight: _LayerFlight) -> AsyncIterator[Applied]:
        """Make a layer's snapshot, and keep it as long as the block lasts."""
        try:
            async with held_lease(self._meta, self._namespace) as lease:
                yield await self._make(work, flight, lease)
        finally:
            flight.is_queued.set()
            flight.is_ready.set()

    async def _make(self, work: _Work, flight: _LayerFlight, lease: str) -> Applied:
        key = f"extract-{secrets.token_hex(6)} {work.chain_id}"
        try:
            applied = await self._apply(work, flight, key, lease)
            if work.below is not None:
                await work.below.is_ready.wait()
                if work.below.error is not None:
                    raise work.below.error
            flight.is_ready.set()
            sealer = self._sealer(work.snapshotter)
            if not await sealer.commit(work.commit(key, lease), flight.report):
                await self._discard(work.snapshotter, key)
            await trio.to_thread.run_sync(self._label_blob, work)
        except EngineError:
            await self._discard(work.snapshotter, key)
            if work.below is not None:
                await work.below.result()  # of several errors the lowest counts
            raise
        except BaseException:
            await self._discard(work.snapshotter, key)
            raise
        return applied

    async def _apply(self, work: _Work, flight: _LayerFlight, key: str, lease: str) -> Applied:
        below = work.below
        parent = ""
        if below is not None and not work.snapshotter.capabilities.rebase:
            await below.result()
            parent = work.parent
        digest = work.layer.descriptor.digest
        job = await trio.to_thread.run_sync(self._begin, work, key, parent, lease)
        show = partial(flight.report, Step.UNPACK, digest, job.size)
        if below is not None:
            await below.is_queued.wait()
        flight.is_queued.set()
        show(0)
        try:
            applied = await self._pool.apply(job, show)
        except Refused as error:
            raise Refused(f"layer {digest}: {error}") from None
        show(job.size)
        if applied.diff_id != work.layer.diff_id:
            raise DigestMismatch(f"layer {digest}, unpacked,", work.layer.diff_id, applied.diff_id)
        return applied

    def _begin(self, work: _Work, key: str, parent: str, lease: str) -> ApplyJob:
        blob = self._content.info(work.layer.descriptor.key, lease=lease)
        about = {labels.SNAPSHOT_REF: str(work.chain_id)}
        work.snapshotter.prepare(key, parent, labels=about, lease=lease)
        return ApplyJob(
            root=str(self._root),
            number=blob.number,
            size=blob.size,
            compression=work.layer.compression,
            diff_id=work.layer.diff_id,
            target=work.snapshotter.sink(key),
            failpoints=failpoints.terms(),
        )

    def _sealer(self, snapshotter: Snapshotter) -> Sealer:
        return self._sealers.setdefault(snapshotter.name, Sealer(snapshotter, self._pool))

    def _label_blob(self, work: _Work) -> None:
        digest = work.layer.descriptor.key
        if work.layer.diff_id != digest:
            self._content.update(digest, {labels.UNCOMPRESSED: work.layer.diff_id})

    @staticmethod
    async def _discard(snapshotter: Snapshotter, key: str) -> None:
        """Remove an active snapshot that was not committed."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove, snapshotter, key)


def _remove(snapshotter: Snapshotter, key: str) -> None:
    try:
        number = snapshotter.remove(key)
    except NotFound:
        return
    except EngineError as error:  # the lease ends, so that a collection takes it
        _log.warning("snapshot %s stays for now: %s", key, error)
        return
    snapshotter.cleanup(only={number})


def _check_image(applied: Sequence[Applied]) -> None:
    """Refuse an image whose layers are within the bounds one by one, but not together."""
    if sum(one.entries for one in applied) > limits.IMAGE_ENTRIES:
        raise Refused(f"image has over {limits.IMAGE_ENTRIES} entries in its layers")
    if sum(one.bytes_unpacked for one in applied) > limits.IMAGE:
        raise Refused(f"image has over {limits.IMAGE} bytes in its layers, unpacked")
