"""Commands on mounts: mount, umount, mounts."""

from pathlib import Path

import click

from engine.app import Engine
from engine.cli.context import Context, as_json, platform_option, snapshotter_option
from engine.cli.output import age, print_json, print_table, progress, say
from engine.errors import InvalidArgument, NotFound
from engine.kv.schema import Image
from engine.metadata.mounts import MountRecord, MountState
from engine.mounts.mounting import Order
from engine.mounts.options import parse_options
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["COMMANDS"]

_folder = click.argument("target", type=click.Path(path_type=Path, readable=False))


@click.command("mount")
@click.argument("name", metavar="IMAGE")
@_folder
@click.option("--rw", is_flag=True, help="Writable, in a snapshot of its own that umount keeps.")
@snapshotter_option
@platform_option
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="As mount(8): noexec,dev,...")
@click.option("--name", "label", metavar="NAME", help="What to call the mount in `lamina mounts`.")
@as_json
@click.pass_obj
def mount(
    context: Context,
    name: str,
    target: Path,
    rw: bool,
    snapshotter: str | None,
    platform: Platform,
    options: tuple[str, ...],
    label: str | None,
    as_json: bool,
) -> None:
    """Mount an image at a folder, read-only; unpack it first if need be.

    IMAGE may also be the name of a writable mount that was kept. Without -o suid,dev, setuid files and
    devices of the image mean nothing.
    """
    words = parse_options(options)
    if "rw" in words and not rw:
        raise InvalidArgument("-o rw: a mount is writable with --rw, in a snapshot of its own")

    async def work(engine: Engine) -> MountRecord:
        stores = engine.stores
        backend = stores.snapshotter(snapshotter) if snapshotter else None
        place = stores.mounting.ready(target, label)  # before the long part, not after it
        image = _image(stores, name)
        if isinstance(image, MountRecord):
            if label or snapshotter:
                raise InvalidArgument(f"{name} is a mount that is kept: it has its name and backend")
            return stores.mounting.mount_kept(image, place, words)
        if backend is None:
            kept = _kept(stores, image, place, label) if rw else None
            backend = stores.snapshotter(kept.backend if kept else None)
        with progress() as report:
            await engine.unpack(name, snapshotter=backend.name, platform=platform, report=report)
        order = Order(
            target=place,
            backend=backend,
            image=image.name,
            top=stores.top_of(image, backend, platform),
            rw=rw,
            name=label,
            options=words,
        )
        return stores.mounting.mount(order)

    record = context.run(work)
    if as_json:
        print_json(_row(record))


def _image(stores: Stores, name: str) -> Image | MountRecord:
    """Return the image of a name or, if there is none, the mount that is kept under it."""
    try:
        return stores.images.get(name)
    except (NotFound, InvalidArgument):
        kept = stores.mounting.kept(name)
        if kept is None:
            raise
        return kept


def _kept(stores: Stores, image: Image, place: Path, label: str | None) -> MountRecord | None:
    """Return what an earlier writable mount kept, to be used again with its own backend."""
    mounting = stores.mounting
    return mounting.kept(label) if label else mounting.kept_at(place, image.name, None)


def _row(record: MountRecord) -> dict[str, object]:
    return {
        "name": record.key,
        "target": record.target,
        "image": record.image,
        "snapshotter": record.backend,
        "rw": record.rw,
        "state": record.state,
        "created": record.created,
        "parent": record.top,
    }


@click.command("umount")
@_folder
@click.option("--lazy", is_flag=True, help="Take it out of sight even while it is in use.")
@click.pass_obj
def umount(context: Context, target: Path, lazy: bool) -> None:
    """Unmount what `lamina mount` mounted; a writable snapshot stays."""
    with context.stores() as stores:
        record = stores.umount(target, lazy=lazy)
        if record.state == MountState.MOUNTED:
            why = stores.broken.get(
                record.backend, "its files are in use, as in another mount namespace"
            )
            say(f"unmounted; its snapshot {record.key} stays for a later `lamina gc`: {why}")
    if record.state == MountState.LAZY:
        say(
            f"out of sight, but whoever is in it goes on; its files stay until the next boot, or until: "
            f"lamina snapshots rm {record.key}"
        )
    elif record.state == MountState.KEPT:
        say(f"what was written is kept; remove it with: lamina snapshots rm {record.key}")


@click.command("mounts")
@as_json
@click.pass_obj
def mounts(context: Context, as_json: bool) -> None:
    """List what is mounted, and the writable mounts that are kept; a damaged record with its error."""
    with context.reading() as stores:
        records, damaged = stores.mounting.walk(), stores.mounting.damaged()
    if as_json:
        errors = [{"name": lost.name, "error": lost.error} for lost in damaged]
        print_json([*(_row(record) for record in records), *errors])
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
    rows += [("-", "-", "-", "-", lost.error, "-", lost.name) for lost in damaged]
    print_table(
        ("TARGET", "IMAGE", "SNAPSHOTTER", "MODE", "STATE", "CREATED", "NAME"),
        rows,
    )


COMMANDS = (mount, umount, mounts)
