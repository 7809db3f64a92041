"""Unpacks an image: layers in parallel and out of order, commits in order.

Async. Each missing layer is a flight of its own (`engine.unpack.flights`): applied by a worker into an
active snapshot, then committed once all below it are. Whoever needs a layer at the same place joins its
flight. When layer k fails, those below are committed, k and above are not, and its error is raised.
Whatever happens, no active snapshot stays.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from engine import failpoints, labels, limits
from engine.content.image import Layer, ResolvedImage
from engine.content.store import ContentStore
from engine.diff.apply import Applied
from engine.errors import DigestMismatch, EngineError, NotFound, Refused
from engine.kv.schema import Blob
from engine.oci.digest import Digest
from engine.oci.identity import ChainID
from engine.progress import Report, Step
from engine.snapshots import Commit, Snapshotter, Usage
from engine.unpack.committer import has
from engine.unpack.jobs import ApplyJob
from engine.unpack.layer_flight import LayerFlight
from engine.unpack.lease import HeldLease
from engine.unpack.packing import mistyped
from engine.unpack.plan import missing_from
from engine.unpack.workshop import Workshop

__all__ = ["CLEANUP_S", "Unpacked", "Unpacker"]

_log = logging.getLogger(__name__)
CLEANUP_S = 0.5
"""How long files of work that is given up are deleted: who cancels wants to go. `gc` does the rest."""


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
    reused: int = 0
    """How many layers were not applied, as their data was here from another base."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One layer to be made a committed snapshot."""

    layer: Layer
    blob: Blob
    chain_id: ChainID
    parent: str
    snapshotter: Snapshotter
    below: LayerFlight | None
    standing: Usage
    """What the layers take up that are there already."""
    lease: HeldLease

    def commit(self, key: str) -> Commit:
        about = {
            labels.SNAPSHOT_REF: str(self.chain_id),
            labels.DIFF_ID: str(self.layer.diff_id),
        }
        if self.parent:
            about[labels.PARENT_CHAIN_ID] = self.parent
        parent = self.parent or None
        return Commit(
            name=self.chain_id,
            key=key,
            parent=parent,
            lease=self.lease.id,
            diff_id=self.layer.diff_id,
            labels=about,
        )


class Unpacker:
    """Unpacks images of one namespace; each layer once, however many ask for it."""

    def __init__(self, root: Path, namespace: str, content: ContentStore, workshop: Workshop) -> None:
        self._root = root
        self._namespace = namespace
        self._content = content
        self._shop = workshop

    async def unpack(
        self,
        image: ResolvedImage,
        snapshotter: Snapshotter,
        lease: HeldLease,
        report: Report,
        *,
        strict: bool = False,
    ) -> Unpacked:
        """Unpack what is missing of `image` and anchor it to the image's config.

        Everything made or found is pinned by `lease`. With `strict` a layer whose media type disagrees
        with its bytes is refused, unpacked already or not; else the bytes decide. Raises Refused for a
        bad layer, NotFound where a blob is missing, ResourceExhausted and others.
        """
        chain = image.chain
        snapshotter.capabilities.check_layers(snapshotter.name, len(chain))
        pinned = partial(has, snapshotter, lease.id)
        first = await trio.to_thread.run_sync(missing_from, chain, pinned)
        # The config gets the anchor in the end, so it must still be there then.
        needed = [image.manifest.config.key, *(x.descriptor.key for x in image.layers[first:])]
        _, *blobs = await trio.to_thread.run_sync(self._content.pin, needed, lease.id)
        odd = await trio.to_thread.run_sync(
            partial(mistyped, image.layers, self._content, strict=strict)
        )
        standing = await trio.to_thread.run_sync(_usage, snapshotter, chain[:first])
        made: list[Applied] = []
        async with self._shop.flights.caller(report) as join:
            # Bottom first: whoever joins one has joined all below.
            flights: list[LayerFlight] = []
            parents = ["", *chain][first:]
            parts = zip(image.layers[first:], blobs, chain[first:], parents, strict=False)
            for layer, blob, chain_id, parent in parts:
                below = flights[-1] if flights else None
                work = _Work(layer, blob, chain_id, parent, snapshotter, below, standing, lease)
                key = (self._namespace, snapshotter.name, chain_id)
                flights.append(join(key, partial(self._layer, work)))
            for flight, name in zip(flights, chain[first:], strict=True):
                made.append(await flight.result())
                if flight.lease is not lease:
                    await trio.to_thread.run_sync(pinned, name)
        applied = [one for one in made if not one.is_reused]
        top = chain[-1] if chain else ""
        if top:
            verified = [
                layer for layer, one in zip(image.layers[first:], made, strict=True) if not one.is_reused
            ]
            await trio.to_thread.run_sync(self._anchor, image, verified, snapshotter, top)
        return Unpacked(
            chain_id=top,
            layers=len(chain),
            applied=len(applied),
            entries=sum(one.entries for one in applied),
            bytes_unpacked=sum(one.bytes_unpacked for one in applied),
            xattrs_left_out=sum(one.xattrs_left_out for one in applied),
            mistyped=odd,
            reused=len(made) - len(applied),
        )

    def _anchor(
        self, image: ResolvedImage, verified: Sequence[Layer], snapshotter: Snapshotter, top: str
    ) -> None:
        changes: dict[Digest, labels.Labels] = {
            layer.descriptor.key: {labels.UNCOMPRESSED: layer.diff_id}
            for layer in verified
            if layer.diff_id != layer.descriptor.key
        }
        changes[image.manifest.config.key] = {labels.snapshot_ref(snapshotter.name): top}
        self._content.update_all(changes)
        failpoints.hit("unpack.anchored")

    def _layer(self, work: _Work, flight: LayerFlight) -> AbstractAsyncContextManager[Applied]:
        """Make a layer's snapshot in the block to come, and keep it as long as that lasts.

        The lease is held from now on: whoever began it may have left before the block is entered.
        """
        flight.lease = work.lease
        return self._kept(work, flight, work.lease.hold())

    @asynccontextmanager
    async def _kept(
        self, work: _Work, flight: LayerFlight, held: AbstractAsyncContextManager[HeldLease]
    ) -> AsyncIterator[Applied]:
        try:
            async with held:
                yield await self._make(work, flight)
        finally:
            flight.is_queued.set()
            flight.is_ready.set()

    async def _make(self, work: _Work, flight: LayerFlight) -> Applied:
        key = f"extract-{secrets.token_hex(6)} {work.chain_id}"
        try:
            applied = await self._apply(work, flight, key)
            if work.below is not None:
                await work.below.is_ready.wait()
                if work.below.error is not None:
                    raise work.below.error
            _count(work, flight, applied)
            flight.is_ready.set()
            committer = self._shop.committer(self._namespace, work.snapshotter)
            if not await committer.commit(work.commit(key), flight.report):
                await self._discard(work.snapshotter, key)
        except EngineError:
            await self._discard(work.snapshotter, key)
            if work.below is not None:
                await work.below.result()  # of several errors the lowest counts
            raise
        except BaseException:
            await self._discard(work.snapshotter, key)
            raise
        return applied

    async def _apply(self, work: _Work, flight: LayerFlight, key: str) -> Applied:
        below = work.below
        parent = ""
        if below is not None and not work.snapshotter.capabilities.rebase:
            await below.result()
            parent = work.parent
        elif below is not None:
            await below.is_queued.wait()
        flight.is_queued.set()
        digest = work.layer.descriptor.digest
        show = partial(flight.report, Step.UNPACK, digest, work.blob.size)
        reused = await trio.to_thread.run_sync(self._reuse, work, key)
        if reused is not None:
            return reused
        async with self._shop.pool.slot():
            job = await trio.to_thread.run_sync(self._begin, work, key, parent)
            show(0)
            try:
                applied = await self._shop.pool.apply(job, show)
            except Refused as error:
                raise Refused(f"layer {digest}: {error}") from None
        show(work.blob.size)
        if applied.diff_id != work.layer.diff_id:
            raise DigestMismatch(f"layer {digest}, unpacked,", work.layer.diff_id, applied.diff_id)
        return applied

    @staticmethod
    def _reuse(work: _Work, key: str) -> Applied | None:
        """Begin a snapshot with the data of the same layer on another base, if that is here."""
        about = {labels.SNAPSHOT_REF: str(work.chain_id)}
        found = work.snapshotter.reuse(key, work.layer.diff_id, labels=about, lease=work.lease.id)
        if found is None:
            return None
        # What it takes up counts towards the image's bounds, as that of the layers below.
        return Applied(
            diff_id=work.layer.diff_id,
            bytes_unpacked=found.size,
            entries=found.inodes,
            xattrs_left_out=0,
            is_reused=True,
        )

    def _begin(self, work: _Work, key: str, parent: str) -> ApplyJob:
        about = {labels.SNAPSHOT_REF: str(work.chain_id)}
        work.snapshotter.prepare(key, parent, labels=about, lease=work.lease.id)
        return ApplyJob(
            root=str(self._root),
            number=work.blob.number,
            size=work.blob.size,
            diff_id=work.layer.diff_id,
            target=work.snapshotter.sink(key),
            data=self._content.small(work.blob),
            failpoints=failpoints.terms(),
        )

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
    snapshotter.cleanup(only={number}, seconds=CLEANUP_S)


def _usage(snapshotter: Snapshotter, chain: Sequence[str]) -> Usage:
    parts = [snapshotter.usage(name) for name in chain]
    return Usage(sum(part.size for part in parts), sum(part.inodes for part in parts))


def _count(work: _Work, flight: LayerFlight, applied: Applied) -> None:
    """Add a layer to those below it; Refused, before it is committed, if that is too much."""
    below = work.below
    entries, size = (below.entries, below.size) if below else (work.standing.inodes, work.standing.size)
    flight.entries = entries + applied.entries
    flight.size = size + applied.bytes_unpacked
    if flight.entries > limits.IMAGE_ENTRIES:
        raise Refused(f"image has over {limits.IMAGE_ENTRIES} entries in its layers")
    if flight.size > limits.IMAGE:
        raise Refused(f"image has over {limits.IMAGE} bytes in its layers, unpacked")
