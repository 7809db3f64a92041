"""Commands on what is mounted: umount, mounts."""

import os
from pathlib import Path

import click

from engine.cli import shapes
from engine.cli.completion import mount_targets
from engine.cli.context import Context, action, listing
from engine.cli.output import View, age, document, say, write
from engine.cli.table import Column, Fault
from engine.metadata.mounts import MountState
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["mounts", "umount"]

_COLUMNS = (
    Column("TARGET"),
    Column("IMAGE", goes=4, least=12),
    Column("SNAPSHOTTER", goes=2),
    Column("MODE", goes=3),
    Column("STATE", goes=5),
    Column("CREATED", goes=1),
    Column("NAME"),
)


@click.command("umount")
@click.argument("target", type=click.Path(path_type=Path, readable=False), shell_complete=mount_targets)
@click.option("--lazy", is_flag=True, help="Take it out of sight even while it is in use.")
@action
@click.pass_obj
def umount(context: Context, target: Path, lazy: bool, view: View) -> None:
    """Unmount what `lamina mount` mounted; what was written stays."""
    with context.stores() as stores:
        record = stores.umount(_place(stores, target), lazy=lazy)
        if record.state == MountState.MOUNTED:
            why = stores.broken.get(
                record.backend, "its files are in use, as in another mount namespace"
            )
            say(f"unmounted; its snapshot {record.key} stays for a later `lamina gc`: {why}")
    if view.json:
        lasting = {MountState.LAZY, MountState.KEPT}
        document(shapes.mount(record, record.state if record.state in lasting else "unmounted"))
    elif record.state == MountState.LAZY:
        view.tell(
            f"out of sight, but whoever is in it goes on; its files stay until the next boot, or until: "
            f"lamina snapshots rm {record.key}"
        )
    elif record.state == MountState.KEPT:
        view.tell(f"what was written is kept; remove it with: lamina snapshots rm {record.key}")


def _place(stores: Stores, target: Path) -> Path:
    """Return the folder that is meant: where there is none, what is mounted under that name."""
    if os.path.lexists(target):
        return target
    named = (record for record in stores.mounting.walk() if record.key == str(target))
    return next((Path(record.target) for record in named if record.state == MountState.MOUNTED), target)


@click.command("mounts")
@listing
@click.pass_obj
def mounts(context: Context, view: View) -> None:
    """List what is mounted, and the writable mounts that are kept."""
    with context.reading() as stores:
        records, damaged = stores.mounting.walk(), stores.mounting.damaged()
    if view.json:
        lost = (shapes.ShownMount(name=record.name, error=record.error) for record in damaged)
        document([*map(shapes.mount, records), *lost])
        return
    if view.quiet:
        write([*(record.key for record in records), *(record.name for record in damaged)])
        return
    rows = [
        (
            record.target,
            familiar(record.image),
            record.backend,
            "rw" if record.rw else "ro",
            record.state,
            age(record.created),
            record.key,
        )
        for record in records
    ]
    faults = [Fault(record.name, record.error) for record in damaged]
    view.table(_COLUMNS, rows, faults, none="nothing is mounted, and nothing kept")
