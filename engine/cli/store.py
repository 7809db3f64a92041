"""Commands on the store as a whole: gc, compact, backends."""

from collections.abc import Mapping
from typing import Any

import click
import msgspec

from engine import plugins
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.context import Context, action, listing
from engine.cli.ending import Incomplete
from engine.cli.output import View, counted, document, human_bytes, resisting, say, write
from engine.cli.table import Column
from engine.compacting import compact_store
from engine.errors import EngineError
from engine.gc.collect import Collected
from engine.oci.reference import familiar

__all__ = ["backends", "compact", "conclude", "gc"]


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@action
@click.pass_obj
def gc(context: Context, dry_run: bool, view: View) -> None:
    """Remove everything that no image, mount or running work holds."""
    with context.reading() if dry_run else context.stores() as stores, progress(view) as report:
        collected = stores.collect(dry_run=dry_run, report=report)
    done = shapes.collection(collected, dry_run=dry_run)
    conclude(view, collected, msgspec.structs.asdict(done), dry_run=dry_run)


def conclude(
    view: View, collected: Collected, done: Mapping[str, Any], *, dry_run: bool = False
) -> None:
    """Show what a collection did; `done` says it to programs."""
    if not view.json and not view.quiet:
        _print(view, collected, dry_run=dry_run)
    for error in collected.errors:
        say(f"lamina: kept: {error}")
    if collected.left:
        raise Incomplete(EngineError(resisting(collected.left)), done)
    if view.json:
        document(done)


def _print(view: View, collected: Collected, *, dry_run: bool) -> None:
    short = view.shortener([*collected.blobs, *(node.key for node in collected.snapshots)])
    write(f"blob      {short(digest)}" for digest in collected.blobs)
    write(f"snapshot  {node.backend} {short(node.key)}" for node in collected.snapshots)
    write(f"ingest    {ref}" for ref in collected.ingests)
    write(f"image     {familiar(name)}" for name in collected.images)
    verb = "would remove" if dry_run else "removed"
    say(
        f"{verb} {counted(len(collected.blobs), 'blob')} ({human_bytes(collected.blob_bytes)}), "
        f"{counted(len(collected.snapshots), 'snapshot')} ({human_bytes(collected.snapshot_bytes)}), "
        f"{counted(len(collected.ingests), 'ingest')}"
    )


@click.command("compact")
@action
@click.pass_obj
def compact(context: Context, view: View) -> None:
    """Make the store's files as small as what they hold, by copies.

    `lamina gc` gives the disk its space back already, where the file system can make holes. Nobody else
    may have the store open, and the disk needs room for a copy.
    """
    with progress(view) as report:
        files = compact_store(context.root, report)
    for file in files:
        before, after = human_bytes(file.disk_before), human_bytes(file.disk_after)
        view.tell(f"{file.name}: {before} -> {after}")
    if view.json:
        document([shapes.compaction(file) for file in files])


@click.command("backends")
@listing
@click.pass_obj
def backends(context: Context, view: View) -> None:
    """List the snapshotters, whether they work here, and why not."""
    with context.reading() as stores:
        found = plugins.backends(stores.root)
    if view.json:
        document([shapes.backend(backend) for backend in found])
        return
    if view.quiet:
        write(backend.name for backend in found)
        return
    yes_no = {True: "yes", False: "no"}
    view.table(
        (Column("NAME"), Column("UNPACKS"), Column("MOUNTS"), Column("WHY NOT", goes=1, least=12)),
        [
            (b.name, yes_no[b.probe.unpacks], yes_no[b.probe.mounts], b.probe.reason or "-")
            for b in found
        ],
        none="no snapshotters",
    )
