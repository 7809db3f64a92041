"""The command `pull`."""

from dataclasses import asdict
from typing import Any

import click

from engine.app import Engine
from engine.cli import shapes
from engine.cli.bars import progress
from engine.cli.context import (
    Context,
    action,
    durability_option,
    lease_option,
    limit_rate_option,
    platform_option,
    snapshotter_option,
)
from engine.cli.importing import default_backend
from engine.cli.output import View, document, short
from engine.cli.reaching import access_options
from engine.cli.running import run
from engine.cli.timings import tell_timings, timings_option
from engine.oci.platform import Platform
from engine.oci.reference import familiar, parse_reference
from engine.pulling import Pulled
from engine.registry.client import Access, open_client

__all__ = ["pull"]


@click.command("pull")
@click.argument("reference", metavar="REF")
@snapshotter_option
@platform_option
@click.option("--all-platforms", is_flag=True, help="Also store what is for other platforms.")
@click.option("--no-unpack", is_flag=True, help="Only store the image.")
@click.option(
    "--keep-blobs/--drop-blobs",
    default=True,
    help="Keep the layers' blobs (the default), or only what is unpacked of them: half the space, but "
    "no push, and no other backend.",
)
@click.option("--strict", is_flag=True, help="Refuse a media type that disagrees with the bytes.")
@access_options
@limit_rate_option
@durability_option
@timings_option
@lease_option
@action
@click.pass_obj
def pull(
    context: Context,
    reference: str,
    snapshotter: str | None,
    platform: Platform | None,
    all_platforms: bool,
    no_unpack: bool,
    keep_blobs: bool,
    strict: bool,
    access: Access,
    limit_rate: float | None,
    durability: str,
    timings: bool,
    lease: str,
    view: View,
) -> None:
    """Pull an image from a registry, and unpack it while it comes.

    REF is [host/]name[:tag][@digest]. Credentials are those of docker: its config.json and the programs
    that it names. What an attempt that failed has fetched is there for the next, for a day.
    """
    parse_reference(reference)  # before there is a store

    async def work(engine: Engine) -> tuple[Pulled, dict[str, Any]]:
        backend = None if no_unpack else snapshotter or default_backend(engine.stores)
        async with open_client(access) as client:
            with progress(view) as report:
                pulled = await engine.using(lease).pull(
                    reference,
                    client,
                    snapshotter=backend,
                    platform=platform,
                    all_platforms=all_platforms,
                    keep_blobs=keep_blobs,
                    strict=strict,
                    report=report,
                )
        digest = pulled.image.target.digest
        done = [pulled.unpacked] if pulled.unpacked else []
        unpacked = [{"digest": digest, "snapshotter": backend, **asdict(one)} for one in done]
        images = [*map(shapes.images(engine.stores), [pulled.image])]
        return pulled, {"images": images, "timings": pulled.timings, "unpacked": unpacked}

    pulled, shown = run(context, work, create=True, durability=durability, bandwidth=limit_rate)
    for note in pulled.unpacked.mistyped if pulled.unpacked else ():
        view.tell(note)
    left_out = pulled.unpacked.xattrs_left_out if pulled.unpacked else 0
    more = f", {left_out} xattrs left out" if left_out else ""
    view.tell(f"pulled {familiar(pulled.image.name)} ({short(pulled.image.target.digest)}){more}")
    if timings:
        tell_timings(view, pulled.timings)
    if view.json:
        document(shown)
