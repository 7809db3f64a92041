"""The command `image prune`.

Sync.
"""

import click
import msgspec

from engine.app import Engine
from engine.cli.collection import collection, conclude
from engine.cli.completion import image_names
from engine.cli.context import Context, action
from engine.cli.output import View
from engine.cli.running import run
from engine.gc.collect import Collected
from engine.running.containerizer import open_containerizer

__all__ = ["prune"]


@click.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Keep none but those in use.")
@click.option(
    "--keep",
    multiple=True,
    metavar="IMAGE",
    shell_complete=image_names,
    help="Keep this one, too; may be repeated.",
)
@action
@click.pass_obj
def prune(context: Context, everything: bool, keep: tuple[str, ...], view: View) -> None:
    """Remove all images but those that are kept or in use.

    What only they kept goes with them. In use is what a container runs, whatever became of its name.
    """
    if not everything and not keep:
        raise click.UsageError("this removes every image that no container uses: --all, or --keep IMAGE")

    async def work(engine: Engine) -> Collected:
        async with open_containerizer(engine) as containers:
            return await containers.prune(keep)

    collected = run(context, work)
    conclude(view, collected, msgspec.to_builtins(collection(collected)))
