"""Unpacks an image: layers in parallel and out of order, commits in order.

Async. Each layer is applied by a worker into an active snapshot of its own. Commits follow chain order,
as many as are ready at a time, so that one flush serves them all. When layer k fails, those below are
committed, k and above are not, and its error is raised. Whatever happens, no active snapshot stays.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from engine import failpoints, labels
from engine.content.image import Layer, ResolvedImage
from engine.content.store import ContentStore
from engine.errors import AlreadyExists, DigestMismatch, EngineError, NotFound, Refused
from engine.oci.identity import ChainID
from engine.progress import Report, Step
from engine.snapshots import Commit, Snapshotter
from engine.unpack.jobs import ApplyJob
from engine.unpack.plan import missing_from
from engine.unpack.pool import WorkerPool

__all__ = ["Unpacked", "unpack"]

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


@dataclass(slots=True)
class _Work:
    """One layer on its way to a committed snapshot."""

    layer: Layer
    chain_id: ChainID
    parent: str
    key: str
    finished: trio.Event = field(default_factory=trio.Event)
    committed: trio.Event = field(default_factory=trio.Event)
    error: EngineError | None = None
    entries: int = 0
    bytes_unpacked: int = 0
    xattrs_left_out: int = 0

    @property
    def commit(self) -> Commit:
        about = {
            labels.SNAPSHOT_REF: str(self.chain_id),
            labels.DIFF_ID: str(self.layer.diff_id),
        }
        if self.parent:
            about[labels.PARENT_CHAIN_ID] = self.parent
        return Commit(name=self.chain_id, key=self.key, parent=self.parent or None, labels=about)


async def unpack(
    image: ResolvedImage,
    *,
    root: Path,
    content: ContentStore,
    snapshotter: Snapshotter,
    pool: WorkerPool,
    lease: str,
    report: Report,
) -> Unpacked:
    """Unpack what is missing of `image` and anchor it to the image's config.

    Everything made or found is pinned by `lease`. Raises Refused for a bad layer, NotFound where a
    blob is missing, ResourceExhausted and others.
    """
    chain = image.chain
    # It gets the anchor in the end, so it must still be there then.
    await trio.to_thread.run_sync(partial(content.info, image.manifest.config.key, lease=lease))
    first = await trio.to_thread.run_sync(partial(_missing_from, chain, snapshotter, lease))
    works = [
        _Work(
            layer=layer,
            chain_id=chain[position],
            parent=chain[position - 1] if position else "",
            key=f"extract-{secrets.token_hex(6)} {chain[position]}",
        )
        for position, layer in enumerate(image.layers)
        if position >= first
    ]
    run = _Run(root, content, snapshotter, pool, lease, report)
    await run.all(works)
    top = chain[-1] if chain else ""
    if top:
        anchor = {labels.snapshot_ref(snapshotter.name): top}
        await trio.to_thread.run_sync(content.update, image.manifest.config.key, anchor)
        failpoints.hit("unpack.anchored")
    return Unpacked(
        chain_id=top,
        layers=len(chain),
        applied=len(works),
        entries=sum(work.entries for work in works),
        bytes_unpacked=sum(work.bytes_unpacked for work in works),
        xattrs_left_out=sum(work.xattrs_left_out for work in works),
    )


def _missing_from(chain: Sequence[ChainID], snapshotter: Snapshotter, lease: str) -> int:
    return missing_from(chain, partial(_has, snapshotter, lease))


def _has(snapshotter: Snapshotter, lease: str, name: str) -> bool:
    """Say whether a snapshot is there, and pin it in the same step."""
    try:
        snapshotter.stat(name, lease=lease)
    except NotFound:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Run:
    """One unpack under way."""

    root: Path
    content: ContentStore
    snapshotter: Snapshotter
    pool: WorkerPool
    lease: str
    report: Report

    async def all(self, works: Sequence[_Work]) -> None:
        """Apply and commit all of `works`, bottom first."""
        failed: EngineError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._start_in_order, works, nursery)
                failed = await self._commit_in_order(works)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._discard, works)
        if failed is not None:
            raise failed

    async def _start_in_order(self, works: Sequence[_Work], nursery: trio.Nursery) -> None:
        """Queue the layers bottom first: what is committed first should not be applied last."""
        for position, work in enumerate(works):
            parent = ""
            if position and not self.snapshotter.capabilities.rebase:
                await works[position - 1].committed.wait()
                parent = work.parent
            try:
                job = await trio.to_thread.run_sync(self._begin, work, parent)
            except EngineError as error:
                work.error = error
                work.finished.set()
                return  # without this layer none above can be committed
            nursery.start_soon(self._apply, work, job)

    async def _apply(self, work: _Work, job: ApplyJob) -> None:
        show = partial(self.report, Step.UNPACK, work.layer.descriptor.digest, job.size)
        try:
            show(0)
            applied = await self.pool.run(job, show)
            show(job.size)
            work.entries = applied.entries
            work.bytes_unpacked = applied.bytes_unpacked
            work.xattrs_left_out = applied.xattrs_left_out
            if applied.diff_id != work.layer.diff_id:
                what = f"layer {work.layer.descriptor.digest}, unpacked,"
                work.error = DigestMismatch(what, work.layer.diff_id, applied.diff_id)
        except Refused as error:
            work.error = Refused(f"layer {work.layer.descriptor.digest}: {error}")
        except EngineError as error:
            work.error = error
        work.finished.set()

    def _begin(self, work: _Work, parent: str) -> ApplyJob:
        blob = self.content.info(work.layer.descriptor.key, lease=self.lease)
        about = {labels.SNAPSHOT_REF: str(work.chain_id)}
        self.snapshotter.prepare(work.key, parent, labels=about, lease=self.lease)
        return ApplyJob(
            root=str(self.root),
            number=blob.number,
            size=blob.size,
            compression=work.layer.compression,
            diff_id=work.layer.diff_id,
            target=self.snapshotter.sink(work.key),
            failpoints=failpoints.terms(),
        )

    async def _commit_in_order(self, works: Sequence[_Work]) -> EngineError | None:
        """Commit each layer as soon as it and all below are applied; return the first error."""
        done = 0
        while done < len(works):
            await works[done].finished.wait()
            if works[done].error:
                return works[done].error
            ready = [works[done]]
            for work in works[done + 1 :]:
                if not work.finished.is_set() or work.error:
                    break
                ready.append(work)
            self.report(Step.FLUSH, works[done].chain_id, len(ready), 0)
            try:
                await trio.to_thread.run_sync(self._commit, ready)
            except EngineError as error:
                return error
            self.report(Step.FLUSH, works[done].chain_id, len(ready), len(ready))
            for work in ready:
                work.committed.set()
            done += len(ready)
        return None

    def _commit(self, ready: Sequence[_Work]) -> None:
        left = list(ready)
        while left:
            try:
                self.snapshotter.commit(*(work.commit for work in left), lease=self.lease)
                break
            except AlreadyExists:
                # Another process was first with some of them: theirs are as good as ours.
                others = [work for work in left if self._has(work.chain_id)]
                if not others:
                    raise
                left = [work for work in left if work not in others]
        for work in ready:
            self._label_blob(work)

    def _has(self, chain_id: str) -> bool:
        return _has(self.snapshotter, self.lease, chain_id)

    def _label_blob(self, work: _Work) -> None:
        digest = work.layer.descriptor.key
        if work.layer.diff_id != digest:
            self.content.update(digest, {labels.UNCOMPRESSED: work.layer.diff_id})

    def _discard(self, works: Sequence[_Work]) -> None:
        """Remove every active snapshot that was not committed."""
        for work in works:
            try:
                self.snapshotter.remove(work.key)
            except NotFound:
                continue
            except EngineError as error:  # the lease ends, so that a collection takes it
                _log.warning("snapshot %s stays for now: %s", work.key, error)
        self.snapshotter.cleanup()
