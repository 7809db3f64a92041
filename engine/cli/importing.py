"""The command `import`."""

from pathlib import Path

import click

from engine import plugins
from engine.app import Engine
from engine.cli.context import (
    Context,
    as_json,
    platform_option,
    replace_option,
    snapshotter_option,
)
from engine.cli.output import print_json, progress, say, short
from engine.errors import NotSupported
from engine.kv.schema import Image
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["COMMANDS"]


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option("--name", help="Name of the image, instead of what its archive says.")
@snapshotter_option
@platform_option
@click.option("--no-unpack", is_flag=True, help="Only store the image.")
@replace_option
@as_json
@click.pass_obj
def import_(
    context: Context,
    path: Path,
    name: str | None,
    snapshotter: str | None,
    platform: Platform,
    no_unpack: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Import an OCI layout folder, an OCI archive or a docker archive, and unpack it."""

    async def work(engine: Engine) -> list[Image]:
        backend = None if no_unpack else snapshotter or _default(engine.stores)
        with progress() as report:
            return await engine.import_image(
                path,
                name=name,
                snapshotter=backend,
                platform=platform,
                replace=replace,
                report=report,
            )

    images = context.run(work, create=True)
    if as_json:
        print_json([{"name": image.name, "digest": image.target.digest} for image in images])
    else:
        for image in images:
            say(f"imported {familiar(image.name)} ({short(image.target.digest)})")


def _default(stores: Stores) -> str:
    try:
        return plugins.default_name(stores.root)
    except NotSupported as error:
        raise NotSupported(f"{error}; add --no-unpack to only store the image") from None


COMMANDS = (import_,)
