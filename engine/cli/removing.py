"""The command `image rm`."""

import click

from engine.cli.bars import progress
from engine.cli.collection import collection, conclude
from engine.cli.completion import image_names
from engine.cli.context import Context, action
from engine.cli.output import View, document

__all__ = ["remove"]


@click.command("rm")
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=image_names)
@click.option("--gc", "collect", is_flag=True, help="Free at once what only they kept, as `gc` does.")
@action
@click.pass_obj
def remove(context: Context, names: tuple[str, ...], collect: bool, view: View) -> None:
    """Remove image names; `lamina gc` then frees what only they kept."""
    with context.stores() as stores:
        removed = stores.images.remove(*names)
        if not collect:
            if view.json:
                document({"removed": removed})
            return
        with progress(view) as report:
            collected = stores.collect(report=report)
    conclude(view, collected, {"removed": removed, "collected": collection(collected)})
