"""Commands on the store as a whole: compact, backends."""

import click

from engine import plugins
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.context import Context, action, listing
from engine.cli.output import View, document, human_bytes, write
from engine.cli.table import Column
from engine.compacting import compact_store

__all__ = ["backends", "compact"]


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
