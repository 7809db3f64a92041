"""Commands on the store as a whole: gc, backends."""

import click

from engine import plugins
from engine.cli.context import Context, as_json
from engine.cli.output import human_bytes, print_json, print_table, resisting, say

__all__ = ["COMMANDS"]


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@as_json
@click.pass_obj
def gc(context: Context, dry_run: bool, as_json: bool) -> None:
    """Remove everything that no image, mount or running work holds."""
    with context.reading() if dry_run else context.stores() as stores:
        collected = stores.collect(dry_run=dry_run)
    if collected.left:
        say(f"lamina: {resisting(collected.left)}")
    if as_json:
        print_json(collected)
        return
    for digest in collected.blobs:
        click.echo(f"blob      {digest}")
    for node in collected.snapshots:
        click.echo(f"snapshot  {node.backend} {node.key}")
    for ref in collected.ingests:
        click.echo(f"ingest    {ref}")
    for error in collected.errors:
        say(f"lamina: kept: {error}")
    verb = "would remove" if dry_run else "removed"
    say(
        f"{verb} {len(collected.blobs)} blobs ({human_bytes(collected.blob_bytes)}), "
        f"{len(collected.snapshots)} snapshots ({human_bytes(collected.snapshot_bytes)}), "
        f"{len(collected.ingests)} ingests"
    )


@click.command("backends")
@as_json
@click.pass_obj
def backends(context: Context, as_json: bool) -> None:
    """List the snapshotters, whether they work here, and why not."""
    with context.reading() as stores:
        found = plugins.backends(stores.root)
    if as_json:
        print_json(
            [
                {
                    "name": backend.name,
                    "unpacks": backend.probe.unpacks,
                    "mounts": backend.probe.mounts,
                    "reason": backend.probe.reason,
                }
                for backend in found
            ]
        )
        return
    yes_no = {True: "yes", False: "no"}
    print_table(
        ("NAME", "UNPACKS", "MOUNTS", "WHY NOT"),
        [
            (b.name, yes_no[b.probe.unpacks], yes_no[b.probe.mounts], b.probe.reason or "-")
            for b in found
        ],
    )


COMMANDS = (gc, backends)
