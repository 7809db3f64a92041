"""The command `unpack`."""

from dataclasses import asdict

import click

from engine.app import Engine
from engine.cli.bars import progress
from engine.cli.completion import image_names
from engine.cli.context import (
    Context,
    action,
    durability_option,
    lease_option,
    platform_option,
    snapshotter_option,
)
from engine.cli.output import View, document, human_bytes, write
from engine.cli.running import run
from engine.cli.timings import tell_timings, timings_option
from engine.oci.platform import Platform
from engine.unpack.unpacker import Unpacked

__all__ = ["unpack"]


@click.command("unpack")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@snapshotter_option
@platform_option
@click.option("--strict", is_flag=True, help="Refuse a media type that disagrees with the bytes.")
@durability_option
@timings_option
@lease_option
@action
@click.pass_obj
def unpack(
    context: Context,
    name: str,
    snapshotter: str | None,
    platform: Platform | None,
    strict: bool,
    durability: str,
    timings: bool,
    lease: str,
    view: View,
) -> None:
    """Unpack an image into snapshots; what is there is not done again."""

    async def work(engine: Engine) -> tuple[str, Unpacked]:
        backend = engine.stores.snapshotter(snapshotter).name
        with progress(view) as report:
            unpacked = await engine.using(lease).unpack(
                name, snapshotter=backend, platform=platform, strict=strict, report=report
            )
        return backend, unpacked

    backend, done = run(context, work, durability=durability)
    if view.json:
        document({"snapshotter": backend, **asdict(done)})
        return
    for note in done.mistyped:
        view.tell(note)
    left_out = f", {done.xattrs_left_out} xattrs left out" if done.xattrs_left_out else ""
    reused = f", {done.reused} reused from another base" if done.reused else ""
    view.tell(
        f"unpacked {done.applied} of {done.layers} layers: {done.entries} entries, "
        f"{human_bytes(done.bytes_unpacked)}{left_out}{reused}"
    )
    if timings:
        tell_timings(view, done.timings)
    write([done.chain_id])
