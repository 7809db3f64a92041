"""One import, from a source to names: brought in and unpacked, and then named all at once.

Async.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from engine.archive.images import Planned
from engine.archive.importer import (
    FailedImage,
    Imported,
    PassedOver,
    Wanted,
    about,
    import_images,
)
from engine.archive.intake import Nobody
from engine.beside import beside
from engine.content.image import ResolvedImage
from engine.errors import FailedPrecondition
from engine.failpoints import hit
from engine.following import Following
from engine.kv.schema import Image
from engine.observing.counting import bringing_in
from engine.observing.metering import Moved
from engine.observing.tally import both
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.phases import Phase, Spent, Timings, measured
from engine.progress import Report, Step
from engine.snapshots import Snapshotter
from engine.stores import Stores
from engine.unpack.arrivals import Arrival, Arrivals
from engine.unpack.lease import HeldLease
from engine.unpack.packing import mistyped
from engine.unpack.unpacker import Unpacked, Unpacker

__all__ = ["ImportResult", "Importing"]


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import brought in, and what it did not."""

    images: list[Image] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    """What the source has besides images: charts, signatures, attestations."""
    failed: list[FailedImage] = field(default_factory=list)
    """Images beside good ones that are damaged or incomplete; their errors name them."""
    unpacked: dict[str, Unpacked] = field(default_factory=dict)
    """What was done to unpack each image, by its digest."""
    timings: Timings = field(default_factory=dict)
    """Where the time went to bring them in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importing:
    """How to import: what is wanted, the backend to unpack for and how, whether names may move."""

    stores: Stores
    unpacker: Unpacker
    arrivals: Arrivals
    wanted: Wanted
    backend: Snapshotter | None
    strict: bool
    replace: bool
    report: Report

    async def run(self, origin: Path | int, lease: HeldLease) -> ImportResult:
        """Import from a path or an open descriptor. What failed is left to the lease."""
        async with beside() as nursery:
            unpack = partial(self._unpack, lease)
            following = Following(self.arrivals, self.stores.namespace, nursery, unpack)
            fetching: dict[Phase, Spent] = {}
            meter = self.stores.root.meter
            with bringing_in(meter, Moved.STORED) as tally:
                brought = await trio.to_thread.run_sync(
                    partial(
                        measured(Phase.FETCH, fetching)(import_images),
                        origin,
                        self.stores.content,
                        self.wanted,
                        spool=self.stores.root.trash,
                        lease=lease.id,
                        report=_cancellable(both(tally, self.report)),
                        check=self._check,
                        follower=following if self.backend else Nobody(),
                    )
                )
            meter.spent(fetching)
            unpacked: dict[str, Unpacked] = {}
            good: list[Imported] = []
            for one in brought.images:
                with brought.collecting(one.listed):
                    if self.backend:
                        unpacked[one.target.digest] = await following.unpacked(one.image)
                    elif self.strict:
                        await trio.to_thread.run_sync(self._check_types, one)
                    good.append(one)
        brought.check_some(good)
        targets = {name: one.target for one in good for name in one.names}
        images = await trio.to_thread.run_sync(self._put, targets)
        return ImportResult(images, brought.passed_over, brought.failed, unpacked, fetching)

    def _unpack(
        self, lease: HeldLease, image: ResolvedImage, arrivals: Mapping[Digest, Arrival] | None
    ) -> Awaitable[Unpacked]:
        assert self.backend
        return self.unpacker.unpack(
            image, self.backend, lease, self.report, strict=self.strict, arrivals=arrivals
        )

    def _check(self, images: Sequence[Planned]) -> None:
        """Find out before the work what would stop it after."""
        for image in images:
            if image.target:
                targets = dict.fromkeys(image.names, image.target)
                self.stores.images.check_all(targets, replace=self.replace)
            if self.backend:
                try:
                    self.backend.capabilities.check_layers(self.backend.name, image.layers)
                except FailedPrecondition as error:
                    raise about(image.listed, error) from None

    def _check_types(self, one: Imported) -> None:
        mistyped(one.image.layers, self.stores.content, strict=True)

    def _put(self, targets: Mapping[str, Descriptor]) -> list[Image]:
        images = self.stores.images.put_all(targets, replace=self.replace)
        hit("import.named")
        return images


def _cancellable(report: Report) -> Report:
    """Return a report that also ends work on a thread once its task is cancelled."""

    def check(step: Step, item: str, total: int, done: int, /) -> None:
        trio.from_thread.check_cancelled()
        report(step, item, total, done)

    return check
