"""The commands `push` and `copy`."""

from collections import Counter

import click

from engine.app import Engine
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.completion import image_names
from engine.cli.context import Context, action, limit_rate_option, platform_option
from engine.cli.output import View, document, human_bytes, short
from engine.cli.reaching import access_options
from engine.cli.running import run, run_with
from engine.copying import copy_image
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.registry.client import Access, Client, open_client
from engine.registry.lanes import Lanes
from engine.registry.sending import Pushed
from engine.registry.uploading import Way

__all__ = ["copy", "push"]


@click.command("push")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@click.argument("reference", metavar="[REF]", required=False)
@platform_option
@access_options
@limit_rate_option
@action
@click.pass_obj
def push(
    context: Context,
    name: str,
    reference: str | None,
    platform: Platform | None,
    access: Access,
    limit_rate: float | None,
    view: View,
) -> None:
    """Push an image to a registry: only what is not there.

    REF is [host/]name[:tag][@digest], by default the image's own name. It means the image once all of
    it is there. Of an index all has to be here; with --platform one image of it goes alone.
    """

    async def work(engine: Engine) -> Pushed:
        async with open_client(access) as client:
            with progress(view) as report:
                return await engine.push(name, client, reference, platform=platform, report=report)

    _tell("pushed", run(context, work, bandwidth=limit_rate), view)


@click.command("copy")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@platform_option
@click.option("--referrers", is_flag=True, help="Also what refers to it: signatures, attestations.")
@access_options
@limit_rate_option
@action
def copy(
    source: str,
    destination: str,
    platform: Platform | None,
    referrers: bool,
    access: Access,
    limit_rate: float | None,
    view: View,
) -> None:
    """Copy an image between registries; nothing of it is stored here.

    SRC and DST are [host/]name[:tag][@digest]. All platforms go unless one is chosen; what DST's
    registry has is not sent.
    """

    async def work(client: Client) -> Pushed:
        with progress(view) as report:
            return await copy_image(
                client,
                source,
                destination,
                platform=platform,
                referrers=referrers,
                lanes=Lanes(bandwidth=limit_rate),
                report=report,
            )

    _tell("copied", run_with(open_client(access), work), view)


def _tell(what: str, pushed: Pushed, view: View) -> None:
    ways = Counter(pushed.ways.values())
    parts = [f"{ways[Way.SENT]} sent, {human_bytes(pushed.bytes_sent)}"] if ways[Way.SENT] else []
    parts += [f"{ways[way]} {way}" for way in (Way.MOUNTED, Way.THERE) if ways[way]]
    name = familiar(str(pushed.reference))
    view.tell(f"{what} {name} ({short(pushed.target.digest)}): {', '.join(parts)}")
    if pushed.left_out:
        view.tell(f"left out {len(pushed.left_out)} layers that are not to be distributed")
    if view.json:
        document(shapes.pushed(pushed))
