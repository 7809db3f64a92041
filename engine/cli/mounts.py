"""Commands on mounts: mount, umount."""

from pathlib import Path

import click

from engine.app import Engine
from engine.cli.context import Context, as_json, snapshotter_option
from engine.cli.output import print_json, progress, say
from engine.snapshots import Info, Kind

__all__ = ["COMMANDS"]

_folder = click.argument("target", type=click.Path(path_type=Path, readable=False))


@click.command("mount")
@click.argument("name", metavar="IMAGE")
@_folder
@click.option("--rw", is_flag=True, help="Writable, in a snapshot of its own that umount keeps.")
@snapshotter_option
@as_json
@click.pass_obj
def mount(
    context: Context, name: str, target: Path, rw: bool, snapshotter: str | None, as_json: bool
) -> None:
    """Mount an image at a folder, read-only; unpack it first if need be."""

    async def work(engine: Engine) -> Info:
        stores = engine.stores
        backend = stores.snapshotter(snapshotter)
        stores.mount_point(target)  # before the long part, not after it
        with progress() as report:
            await engine.unpack(name, snapshotter=backend.name, report=report)
        return stores.mount(stores.images.get(name), backend, target, rw=rw)

    info = context.run(work)
    if as_json:
        print_json(info)


@click.command("umount")
@_folder
@click.pass_obj
def umount(context: Context, target: Path) -> None:
    """Unmount what `lamina mount` mounted; a writable snapshot stays."""
    with context.stores() as stores:
        info = stores.umount(target)
    if info.kind is Kind.ACTIVE:
        say(f"what was written is kept; remove it with: lamina snapshots rm '{info.key}'")


COMMANDS = (mount, umount)
