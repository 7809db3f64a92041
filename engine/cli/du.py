"""The command `du`: what the store takes up, by image and container, and what removing one would free.

Sync.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import click
import msgspec
from msgspec import UNSET, UnsetType

from engine.accounting import Accounts, ContainerShare, ImageUsage, Overhead, Share, StoreUsage
from engine.cli.bars import progress
from engine.cli.context import Context, listing
from engine.cli.output import View, document, human_bytes, write
from engine.cli.table import Column, Fault
from engine.kv.table import Damaged
from engine.oci.reference import familiar

__all__ = ["drawn", "du"]

_IMAGES = (
    Column("IMAGE"),
    Column("FREES", right=True),
    Column("", goes=1),
    Column("CONTENT", goes=4, right=True),
    Column("SNAPSHOTS", goes=3, right=True),
    Column("SHARED", goes=5, right=True),
)
_CONTAINERS = (
    Column("CONTAINER"),
    Column("FREES", right=True),
    Column("WRITTEN", goes=2, right=True),
    Column("LOGS", goes=1, right=True),
    Column("IMAGE", goes=3, least=12),
)
_PARTS = (Column("TOTAL"), Column("SIZE", right=True), Column("", goes=1, least=12))
_WIDE = 24  # of the longest bar
_FULL, _LIGHT = "█", "░"


class ShownImageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What an image name keeps."""

    name: str
    digest: str | UnsetType = UNSET
    exclusive: Share | UnsetType = UNSET
    shared: Share | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownContainerShare(msgspec.Struct, frozen=True, kw_only=True):
    """What a container takes up beside its image."""

    name: str
    image: str | UnsetType = UNSET
    written: int | UnsetType = UNSET
    files: int | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a store takes up on the disk."""

    images: list[ShownImageUsage]
    exclusive: Share
    shared: Share
    containers: list[ShownContainerShare]
    garbage: Share
    elsewhere: Share
    overhead: Overhead
    total: int


@click.command("du")
@listing
@click.pass_obj
def du(context: Context, view: View) -> None:
    """Show what takes up space, and what removing it would free."""
    with context.reading() as stores, progress(view) as report:
        accounts = Accounts(stores.root, stores.namespace, stores.broken)
        usage = accounts.store(stores.images.walk(), report)
        found = _Found(usage, stores.images.damaged(), stores.containers.damaged())
    if view.json:
        document(found.shape())
    elif view.quiet:
        write(familiar(row.name) for row in found.images)
    else:
        _print(view, found)


@dataclass(frozen=True)
class _Found:
    """What a store takes up, and the images and containers whose records cannot be read."""

    usage: StoreUsage
    lost_images: Sequence[Damaged]
    lost_containers: Sequence[Damaged]

    @property
    def images(self) -> Sequence[ImageUsage]:
        """The images, first what frees most."""
        rows = self.usage.images
        return sorted(rows, key=lambda row: (-row.exclusive.total, -row.shared.total, row.name))

    @property
    def containers(self) -> Sequence[ContainerShare]:
        """The containers, first what frees most."""
        return sorted(self.usage.containers, key=lambda row: (-row.total, row.name))

    def shape(self) -> ShownUsage:
        """Return the document."""
        images = [
            ShownImageUsage(name=row.name, digest=row.digest, exclusive=row.exclusive, shared=row.shared)
            for row in self.images
        ]
        images += (ShownImageUsage(name=one.name, error=one.error) for one in self.lost_images)
        containers = [
            ShownContainerShare(name=row.name, image=row.image, written=row.written, files=row.files)
            for row in self.containers
        ]
        containers += (
            ShownContainerShare(name=one.name, error=one.error) for one in self.lost_containers
        )
        usage = self.usage
        return ShownUsage(
            images=images,
            exclusive=usage.exclusive,
            shared=usage.shared,
            containers=containers,
            garbage=usage.garbage,
            elsewhere=usage.elsewhere,
            overhead=usage.overhead,
            total=usage.total,
        )


def _print(view: View, found: _Found) -> None:
    usage, ranked = found.usage, found.images
    largest = max((row.exclusive.total + row.shared.total for row in ranked), default=0)
    rows = (
        (
            familiar(row.name),
            human_bytes(row.exclusive.total),
            "" if view.width is None else drawn(row, largest),
            human_bytes(row.exclusive.content),
            human_bytes(row.exclusive.snapshots),
            human_bytes(row.shared.total),
        )
        for row in ranked
    )
    faults = [Fault(familiar(record.name), record.error) for record in found.lost_images]
    view.table(_IMAGES, rows, faults, none="no images")
    click.echo()
    if found.containers or found.lost_containers:
        _print_containers(view, found)
        click.echo()
    written = sum(row.total for row in usage.containers)
    parts = (
        ("one image each", usage.exclusive.total, "what the first column adds up to"),
        ("shared", usage.shared.total, "held by several images, containers, mounts, leases, labels"),
        ("containers", written, "what they wrote, and their logs"),
        ("garbage", usage.garbage.total, "held by nothing; `lamina gc` frees it"),
        ("elsewhere", usage.elsewhere.total, "of other namespaces alone"),
        ("records", usage.overhead.records, "what is known of all this, and rounding"),
        ("free", usage.overhead.free, "pages that new blobs will fill"),
        ("files", usage.overhead.files, "folders and small files, and the reserve"),
        ("all", usage.total, "as `du -s` says"),
    )
    shown = [(name, human_bytes(size), about) for name, size, about in parts if size]
    view.table(_PARTS, shown, none="")


def _print_containers(view: View, found: _Found) -> None:
    rows = (
        (
            row.name,
            human_bytes(row.total),
            human_bytes(row.written),
            human_bytes(row.files),
            familiar(row.image),
        )
        for row in found.containers
    )
    faults = [Fault(record.name, record.error) for record in found.lost_containers]
    view.table(_CONTAINERS, rows, faults, none="")


def drawn(row: ImageUsage, largest: int) -> str:
    """Return how much of the largest an image is: what it would free, and what it would not."""
    whole = row.exclusive.total + row.shared.total
    wide = round(whole / largest * _WIDE) if largest else 0
    full = round(row.exclusive.total / largest * _WIDE) if largest else 0
    return _FULL * full + _LIGHT * (wide - full)
