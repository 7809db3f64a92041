"""The check of a whole store, in its order: records, images, blobs, snapshots, what belongs to nothing.

Sync. Each part tells what it finds as it goes, and with `repair` that is mended at once: so what comes
later, as a snapshot on one that was damaged, is held against what is there by then.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain

import msgspec

from engine import labels
from engine.errors import EngineError, ResourceExhausted
from engine.fsck.blobs import check_blobs, orphaned_bytes
from engine.fsck.containers import check_containers
from engine.fsck.findings import Checked, Counts, Finding, Trouble, What
from engine.fsck.folders import orphaned_folders
from engine.fsck.images import blobs_of, check_images
from engine.fsck.reapplying import Apply
from engine.fsck.records import Read, SnapshotKey, read_records
from engine.fsck.snapshots import Snapshots
from engine.kv.schema import BLOBS, Image
from engine.kv.verifying import page_troubles
from engine.oci.platform import Platform
from engine.progress import Report, Step, silent
from engine.root import Root

__all__ = ["Scope", "check"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Images of one namespace to which a check is limited."""

    namespace: str
    images: Collection[Image]


class _Meter:
    """Adds up the bytes that were read."""

    def __init__(self, report: Report, item: str, total: int) -> None:
        self._report, self._item, self._total = report, item, total
        self._done = 0
        report(Step.CHECK, item, total, 0)

    def __call__(self, size: int) -> None:
        self._done += size
        self._report(Step.CHECK, self._item, self._total, min(self._done, self._total))

    def end(self) -> None:
        self._report(Step.CHECK, self._item, self._total, self._total)


def check(
    root: Root,
    platform: Platform,
    *,
    scope: Scope | None = None,
    apply: Apply | None = None,
    tell: Callable[[Finding], None] = lambda _finding: None,
    report: Report = silent,
) -> Checked:
    """Check a store, or the images of `scope`; with `apply`, which applies layers, repair it too.

    `tell` is called with each finding as it comes.
    """
    counts = Counts()
    read = read_records(root.meta, counts)
    limits = _Limits() if scope is None else _limits(root, platform, read, scope)
    findings: list[Finding] = []
    for trouble in _troubles(root, platform, read, counts, limits, apply, report):
        finding = trouble.finding if apply is None else _mended(trouble)
        findings.append(finding)
        tell(finding)
    return Checked(findings=findings, counts=counts)


def _mended(trouble: Trouble) -> Finding:
    if trouble.mend is None:
        return trouble.finding
    try:
        return msgspec.structs.replace(trouble.finding, done=trouble.mend())
    except ResourceExhausted:
        raise  # the next would meet it too
    except EngineError as error:
        return msgspec.structs.replace(trouble.finding, waits=str(error))


@dataclass(frozen=True, slots=True)
class _Limits:
    """What is looked at, None for all of a kind."""

    images: Collection[tuple[str, str]] | None = None
    blobs: Collection[tuple[str, str]] | None = None
    snapshots: Collection[SnapshotKey] | None = None


def _limits(root: Root, platform: Platform, read: Read, scope: Scope) -> _Limits:
    blobs: set[tuple[str, str]] = set()
    snapshots: set[SnapshotKey] = set()
    backends = {key[0] for key in read.snapshots}
    for image in scope.images:
        digests, found = blobs_of(root, scope.namespace, image, platform)
        blobs.update((scope.namespace, digest) for digest in digests)
        snapshots.update(
            (backend, scope.namespace, key) for one in found for key in one.chain for backend in backends
        )
    images = {(scope.namespace, image.name) for image in scope.images}
    return _Limits(images, blobs, snapshots)


def _troubles(
    root: Root,
    platform: Platform,
    read: Read,
    counts: Counts,
    limits: _Limits,
    apply: Apply | None,
    report: Report,
) -> Iterator[Trouble]:
    if limits.images is None:
        yield from read.troubles
        yield from _pages(root)
    meter = _Meter(report, "blobs", read.blob_bytes)
    broken: set[int] = set()
    yield from check_blobs(root, counts, meter, broken, limits.blobs)
    meter.end()
    # Then: what was dropped as broken is missed by its images.
    yield from check_images(root, platform, read, counts, limits.images)
    meter = _Meter(report, "snapshots", _packed_bytes(root, read, limits))
    snapshots = Snapshots(root, read, counts, meter, broken, apply, limits.snapshots)
    yield from snapshots.check()
    meter.end()
    if limits.images is None and read.is_readable:
        yield from chain(orphaned_bytes(root, read.numbers), orphaned_folders(root, read))
    if limits.images is None:
        yield from check_containers(root)


def _pages(root: Root) -> Iterator[Trouble]:
    """Look at the files that all of it is in."""
    for environment in (root.meta, root.blobs):
        if found := page_troubles(environment):
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            advice = "`lamina compact` copies what can be read, or restore the store from a backup"
            detail = f"{found[0]}{more}; {advice}"
            yield Trouble(Finding(what=What.PAGES, name=environment.path.name, detail=detail))


def _packed_bytes(root: Root, read: Read, limits: _Limits) -> int:
    """Return how much there is to read to compare the snapshots."""
    total = 0
    with root.meta.read() as txn:
        for key, record in read.snapshots.items():
            if limits.snapshots is None or key in limits.snapshots:
                diff_id = record.labels.get(labels.DIFF_ID, "")
                for digest in read.layers.get((key[1], diff_id), ())[:1]:
                    blob = BLOBS.get(txn, key[1], digest)
                    total += blob.size if blob else 0
    return total
