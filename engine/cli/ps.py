"""The command `ps`.

Sync.
"""

import click

from engine.cli.container_shapes import list_containers
from engine.cli.context import Context, listing
from engine.cli.output import View
from engine.metadata.containers import ContainerState
from engine.running.settling import SettledContainers, told

__all__ = ["ps"]


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that do not run.")
@listing
@click.pass_obj
def ps(context: Context, everything: bool, view: View) -> None:
    """List the containers that run; with --all also those that do not."""
    with context.reading() as stores:
        settling = SettledContainers(stores.root, stores.namespace)
        found = [told(record) for record in settling.look()]
        damaged = settling.records.damaged()
    if not everything:
        found = [status for status in found if status.state == ContainerState.RUNNING]
    none = "no containers" if everything else "nothing runs; `lamina ps --all` lists all containers"
    list_containers(view, found, damaged, none)
