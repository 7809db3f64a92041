"""The command `import`."""

from pathlib import Path

import click

from engine import plugins
from engine.app import Engine
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.context import (
    Context,
    action,
    platform_option,
    replace_option,
    snapshotter_option,
)
from engine.cli.output import View, document, short
from engine.cli.running import run
from engine.errors import NotSupported
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["import_"]


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option("--name", help="Name of the image, instead of what its archive says.")
@snapshotter_option
@platform_option
@click.option("--no-unpack", is_flag=True, help="Only store the image.")
@replace_option
@action
@click.pass_obj
def import_(
    context: Context,
    path: Path,
    name: str | None,
    snapshotter: str | None,
    platform: Platform | None,
    no_unpack: bool,
    replace: bool,
    view: View,
) -> None:
    """Import the images of a folder or an archive, and unpack them.

    PATH is an OCI layout folder, an OCI archive or a docker archive, told apart by content.
    """

    async def work(engine: Engine) -> list[shapes.ShownImage]:
        backend = None if no_unpack else snapshotter or _default(engine.stores)
        with progress(view) as report:
            images = await engine.import_image(
                path,
                name=name,
                snapshotter=backend,
                platform=platform,
                replace=replace,
                report=report,
            )
        return [shapes.image(engine.stores, image) for image in images]

    images = run(context, work, create=True)
    if view.json:
        document(images)
    for image in images:
        view.tell(f"imported {familiar(image.name)} ({short(str(image.digest))})")


def _default(stores: Stores) -> str:
    try:
        return plugins.default_name(stores.root)
    except NotSupported as error:
        raise NotSupported(f"{error}; add --no-unpack to only store the image") from None
