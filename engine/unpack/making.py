"""Makes one layer a committed snapshot: its bytes are applied as they arrive, by one process of all.

Async. Commits wait for those below. Whatever happens, no active snapshot stays.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from engine import failpoints, labels, limits
from engine.content.image import Layer
from engine.content.store import ContentStore
from engine.diff.apply import Applied
from engine.errors import DataLoss, DigestMismatch, EngineError, NotFound, Refused
from engine.observing.metering import Layers
from engine.oci.digest import Digest
from engine.oci.identity import ChainID
from engine.progress import Step
from engine.snapshots import Commit, Snapshotter, Usage
from engine.unpack.arrivals import Arrival
from engine.unpack.committer import has
from engine.unpack.jobs import ApplyJob, Arrived
from engine.unpack.layer_flight import LayerFlight
from engine.unpack.lease import HeldLease
from engine.unpack.slots import Order, Slot
from engine.unpack.workshop import Workshop

__all__ = ["CLEANUP_S", "Maker", "Work"]

_log = logging.getLogger(__name__)
CLEANUP_S = 0.5
"""How long files of work that is given up are deleted: who cancels wants to go. `gc` does the rest."""
_POLL_S = 0.02  # another process cannot tell us that it is done


@dataclass(frozen=True, slots=True)
class Work:
    """One layer to be made a committed snapshot."""

    layer: Layer
    arrival: Arrival
    chain_id: ChainID
    parent: str
    snapshotter: Snapshotter
    below: LayerFlight | None
    standing: Usage
    """What the layers take up that are there already."""
    lease: HeldLease
    order: Order
    flush: bool
    """Whether its data is durable before it is committed."""

    def commit(self, key: str, applied: Applied) -> Commit:
        """Return the step that makes an active snapshot, of which that came, this one."""
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
            blob=self.verified(applied),
            labels=about,
        )

    def waits(self, flight: LayerFlight, step: Step) -> AbstractContextManager[None]:
        """Tell that the layer waits for something, for the length of a block."""
        about = self.layer.descriptor
        return _shown(partial(flight.report, step, about.digest, about.size), about.size)

    def verified(self, applied: Applied) -> str:
        """Return the blob that was found to be the layer, "" if it was another, or none was unpacked."""
        digest = self.layer.descriptor.digest
        return "" if applied.is_reused or digest == self.layer.diff_id else digest


@contextmanager
def _shown(show: Callable[[int], None], size: int) -> Iterator[None]:
    """Tell that something is waited for, and at the end of the block that it is not any more."""
    show(0)
    try:
        yield
    finally:
        show(size)


class Maker:
    """Makes layers of one namespace."""

    def __init__(self, root: Path, namespace: str, content: ContentStore, workshop: Workshop) -> None:
        self._root = root
        self._namespace = namespace
        self._content = content
        self._shop = workshop

    async def make(self, work: Work, flight: LayerFlight) -> Applied | None:
        """Make a layer; return what came of it, None if another process made it meanwhile."""
        async with self._alone(work, flight) as is_made:
            if is_made:
                await self._found(work, flight)
                self._shop.meter.had(Layers.FOUND)
                return None
            return await self._made(work, flight)

    @asynccontextmanager
    async def _alone(self, work: Work, flight: LayerFlight) -> AsyncIterator[bool]:
        """Keep other processes from making the layer; say whether one has made it."""
        locks, name = self._shop.locks, (self._namespace, work.snapshotter.name, work.chain_id)
        take = partial(locks.take, *name)
        is_made = False
        is_had = await trio.to_thread.run_sync(take)
        try:
            if not is_had:
                is_had = await self._wait(work, flight, take)
                pinned = partial(has, work.snapshotter, work.lease.id, work.chain_id)
                is_made = await trio.to_thread.run_sync(pinned)
            yield is_made
        finally:
            if is_had:
                locks.give_back(*name)

    @staticmethod
    async def _wait(work: Work, flight: LayerFlight, take: Callable[[], bool]) -> bool:
        """Wait until another process that makes the layer is done with it, and have the lock."""
        if work.below is not None:  # of a chain one look at a time is enough
            await work.below.done.wait()
        words = f"layer {work.chain_id} is being unpacked"
        with work.waits(flight, Step.OTHER), _shown(partial(flight.report, Step.WAIT, words, 1), 1):
            while not await trio.to_thread.run_sync(take):  # noqa: ASYNC110  no event comes
                await trio.sleep(_POLL_S)
        return True

    async def _found(self, work: Work, flight: LayerFlight) -> None:
        """Count a layer that another process made."""
        usage = await trio.to_thread.run_sync(work.snapshotter.usage, work.chain_id)
        below = work.below
        if below is not None:
            await below.is_ready.wait()
        _count(work, flight, usage.inodes, usage.size)
        flight.is_ready.set()

    async def _made(self, work: Work, flight: LayerFlight) -> Applied:
        """Fill an active snapshot and commit it, after those below; else remove it."""
        key = f"extract-{secrets.token_hex(6)} {work.chain_id}"
        failures = self._shop.flusher.failures
        try:
            applied = await self._filled(work, flight, key)
            if work.below is not None:
                with work.waits(flight, Step.BELOW):
                    await work.below.is_ready.wait()
                if work.below.error is not None:
                    raise work.below.error
            _count(work, flight, applied.entries, applied.bytes_unpacked)
            flight.is_ready.set()
            committer = self._shop.committer(self._namespace, work.snapshotter)
            told = partial(flight.report, Step.FLUSH, work.layer.descriptor.digest)
            step = work.commit(key, applied)
            if not await committer.commit(step, told, failures, flush=work.flush):
                await self._discard(work.snapshotter, key)
                if step.blob:
                    about = {labels.UNCOMPRESSED: step.diff_id}
                    await trio.to_thread.run_sync(self._content.update, Digest(step.blob), about)
        except BaseException as error:
            await self._discard(work.snapshotter, key)
            if isinstance(error, EngineError) and work.below is not None:
                await work.below.result()  # of several errors the lowest counts
            raise
        return applied

    async def _filled(self, work: Work, flight: LayerFlight, key: str) -> Applied:
        """Make an active snapshot of a layer, which is verified: from one that is here, or its bytes."""
        parent = ""
        if work.below is not None and not work.snapshotter.capabilities.rebase:
            with work.waits(flight, Step.BELOW):
                await work.below.result()
            parent = work.parent
        if flight.twin is not None:
            await flight.twin.done.wait()
        reused = await trio.to_thread.run_sync(_reuse, work, key)
        if reused is not None:
            self._shop.meter.had(Layers.REUSED)
            return reused
        while True:
            await work.arrival.beyond(0)
            number = work.arrival.number
            try:
                applied = await self._applied(work, flight, key, parent)
                await work.arrival.whole()
                return applied
            except (DataLoss, DigestMismatch, Refused):
                # Whether it is the layer that is bad, or its way here, the digest tells.
                await work.arrival.whole()
                if number == work.arrival.number:
                    raise
                # What was read is gone: an equal blob was here, or who brought bad bytes has left.
                await self._discard(work.snapshotter, key)

    async def _applied(self, work: Work, flight: LayerFlight, key: str, parent: str) -> Applied:
        """Have a worker apply the bytes as they arrive, in a slot that others have while none do."""
        digest, size = work.layer.descriptor.digest, work.layer.descriptor.size
        show = partial(flight.report, Step.UNPACK, digest, size)
        async with self._shop.pool.slots.slot(work.order) as slot:
            flight.report(Step.PLACE, digest, size, size)
            job = await trio.to_thread.run_sync(self._begin, work, key, parent)
            show(0)
            try:
                with self._flushing(work, show) as told:
                    applied = await self._shop.pool.apply(job, told, partial(_more, work.arrival, slot))
            except Refused as error:
                raise Refused(f"layer {digest}: {error}") from None
            show(size)
        if applied.diff_id != work.layer.diff_id:
            raise DigestMismatch(f"layer {digest}, unpacked,", work.layer.diff_id, applied.diff_id)
        return applied

    def _flushing(
        self, work: Work, show: Callable[[int], None]
    ) -> AbstractContextManager[Callable[[int], None]]:
        return self._shop.flusher.beside(work.snapshotter, show) if work.flush else nullcontext(show)

    def _begin(self, work: Work, key: str, parent: str) -> ApplyJob:
        about = {labels.SNAPSHOT_REF: str(work.chain_id)}
        work.snapshotter.prepare(key, parent, labels=about, lease=work.lease.id)
        blob = work.arrival.blob
        return ApplyJob(
            root=str(self._root),
            number=work.arrival.number,
            arrived=_arrived(work.arrival),
            diff_id=work.layer.diff_id,
            target=work.snapshotter.sink(key),
            data=self._content.small(blob) if blob else b"",
            failpoints=failpoints.terms(),
        )

    @staticmethod
    async def _discard(snapshotter: Snapshotter, key: str) -> None:
        """Remove an active snapshot that was not committed."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove, snapshotter, key)


def _reuse(work: Work, key: str) -> Applied | None:
    """Begin a snapshot with the data of the same layer on another base, if that is here."""
    about = {labels.SNAPSHOT_REF: str(work.chain_id)}
    diff_id, lease = work.layer.diff_id, work.lease.id
    found = work.snapshotter.reuse(key, diff_id, labels=about, lease=lease)
    if found is None:
        return None
    # What it takes up counts towards the image's bounds, as that of the layers below.
    return Applied(
        diff_id=diff_id,
        bytes_unpacked=found.size,
        entries=found.inodes,
        xattrs_left_out=0,
        is_reused=True,
    )


async def _more(arrival: Arrival, slot: Slot, seen: int) -> Arrived:
    """Return how much of a layer is there, once it is more than so many bytes."""
    if not (arrival.is_whole or arrival.there > seen):
        async with slot.given_up():
            await arrival.beyond(seen)
    return _arrived(arrival)


def _arrived(arrival: Arrival) -> Arrived:
    return Arrived(arrival.there, arrival.is_whole)


def _remove(snapshotter: Snapshotter, key: str) -> None:
    try:
        number = snapshotter.remove(key)
    except NotFound:
        return
    except EngineError as error:  # the lease ends, so that a collection takes it
        _log.warning("snapshot %s stays for now: %s", key, error)
        return
    snapshotter.cleanup(only={number}, seconds=CLEANUP_S)


def _count(work: Work, flight: LayerFlight, entries: int, size: int) -> None:
    """Add a layer to those below it; Refused, before it is committed, if that is too much."""
    below = work.below
    flight.entries = entries + (below.entries if below else work.standing.inodes)
    flight.size = size + (below.size if below else work.standing.size)
    if flight.entries > limits.IMAGE_ENTRIES:
        raise Refused(f"image has over {limits.IMAGE_ENTRIES} entries in its layers")
    if flight.size > limits.IMAGE:
        raise Refused(f"image has over {limits.IMAGE} bytes in its layers, unpacked")
