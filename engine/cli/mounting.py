"""The command `mount`."""

from pathlib import Path

import click

from engine.app import Engine
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.completion import image_names
from engine.cli.context import Context, action, platform_option, snapshotter_option
from engine.cli.output import View, document
from engine.cli.running import run
from engine.errors import FailedPrecondition, InvalidArgument
from engine.kv.schema import Image
from engine.metadata.mounts import MountRecord, MountState
from engine.mounts.mounting import Order
from engine.mounts.options import parse_options
from engine.oci.platform import Platform
from engine.stores import Stores

__all__ = ["mount"]


@click.command("mount")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@click.argument("target", type=click.Path(path_type=Path, readable=False))
@click.option("--rw", is_flag=True, help="Writable, in a snapshot of its own that umount keeps.")
@snapshotter_option
@platform_option
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="As mount(8): noexec,dev,...")
@click.option("--name", "label", metavar="NAME", help="What to call the mount in `lamina mounts`.")
@action
@click.pass_obj
def mount(
    context: Context,
    name: str,
    target: Path,
    rw: bool,
    snapshotter: str | None,
    platform: Platform | None,
    options: tuple[str, ...],
    label: str | None,
    view: View,
) -> None:
    """Mount an image at a folder, read-only unless --rw is given.

    It is unpacked first if need be. IMAGE may also be the name of a writable mount that was kept.
    Without -o suid,dev, setuid files and devices of the image mean nothing.
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
        with progress(view) as report:
            await engine.unpack(image.name, snapshotter=backend.name, platform=platform, report=report)
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

    record = run(context, work)
    if view.json:
        document(shapes.mount(record))


def _image(stores: Stores, name: str) -> Image | MountRecord:
    """Return the image of a name, the mount that is kept under it, or the image of a digest."""
    try:
        image = stores.images.named(name)
    except InvalidArgument:  # the names of mounts follow other rules
        image = None
    if image is not None:
        return image
    kept = stores.mounting.kept(name)
    if kept is not None:
        return kept
    for record in stores.mounting.walk():
        if record.key == name and record.state == MountState.LAZY:
            raise FailedPrecondition(
                f"{name} was unmounted with --lazy and may be in use until the next boot; "
                "only then can it be mounted again"
            )
        if record.key == name:
            raise FailedPrecondition(
                f"{name} is {record.state} at {record.target}; unmount it there first"
            )
    return stores.images.get(name)


def _kept(stores: Stores, image: Image, place: Path, label: str | None) -> MountRecord | None:
    """Return what an earlier writable mount kept, to be used again with its own backend."""
    mounting = stores.mounting
    return mounting.kept(label) if label else mounting.kept_at(place, image.name, None)
