"""The command `du`: what the store takes up, by image, and what removing one would free.

Sync.
"""

from collections.abc import Sequence

import click
import msgspec
from msgspec import UNSET, UnsetType

from engine.accounting import Accounts, ImageUsage, Overhead, Share, StoreUsage
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


class ShownUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a store takes up on the disk."""

    images: list[ShownImageUsage]
    exclusive: Share
    shared: Share
    garbage: Share
    elsewhere: Share
    overhead: Overhead
    total: int


@click.command("du")
@listing
@click.pass_obj
def du(context: Context, view: View) -> None:
    """Show what takes up space, and what removing an image would free."""
    with context.reading() as stores, progress(view) as report:
        accounts = Accounts(stores.root, stores.namespace, stores.broken)
        usage = accounts.store(stores.images.walk(), report)
        damaged = stores.images.damaged()
    ranked = sorted(usage.images, key=lambda row: (-row.exclusive.total, -row.shared.total, row.name))
    if view.json:
        document(_shape(usage, ranked, damaged))
    elif view.quiet:
        write(familiar(row.name) for row in ranked)
    else:
        _print(view, usage, ranked, damaged)


def _shape(found: StoreUsage, ranked: Sequence[ImageUsage], damaged: Sequence[Damaged]) -> ShownUsage:
    """Return what a store takes up, its images in an order."""
    images = [
        ShownImageUsage(
            name=row.name,
            digest=row.digest,
            exclusive=row.exclusive,
            shared=row.shared,
        )
        for row in ranked
    ]
    return ShownUsage(
        images=[*images, *(ShownImageUsage(name=lost.name, error=lost.error) for lost in damaged)],
        exclusive=found.exclusive,
        shared=found.shared,
        garbage=found.garbage,
        elsewhere=found.elsewhere,
        overhead=found.overhead,
        total=found.total,
    )


def _print(
    view: View, usage: StoreUsage, ranked: Sequence[ImageUsage], damaged: Sequence[Damaged]
) -> None:
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
    faults = [Fault(familiar(record.name), record.error) for record in damaged]
    view.table(_IMAGES, rows, faults, none="no images")
    click.echo()
    parts = (
        ("one image each", usage.exclusive.total, "what the first column adds up to"),
        ("shared", usage.shared.total, "held by several images, or by mounts, leases, labels"),
        ("garbage", usage.garbage.total, "held by nothing; `lamina gc` frees it"),
        ("elsewhere", usage.elsewhere.total, "of other namespaces alone"),
        ("records", usage.overhead.records, "what is known of all this, and rounding"),
        ("free", usage.overhead.free, "pages that new blobs will fill"),
        ("files", usage.overhead.files, "folders and small files, and the reserve"),
        ("all", usage.total, "as `du -s` says"),
    )
    shown = [(name, human_bytes(size), about) for name, size, about in parts if size]
    view.table(_PARTS, shown, none="")


def drawn(row: ImageUsage, largest: int) -> str:
    """Return how much of the largest an image is: what it would free, and what it would not."""
    whole = row.exclusive.total + row.shared.total
    wide = round(whole / largest * _WIDE) if largest else 0
    full = round(row.exclusive.total / largest * _WIDE) if largest else 0
    return _FULL * full + _LIGHT * (wide - full)
