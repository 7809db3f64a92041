"""The command `import`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
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
    platform_option,
    replace_option,
    snapshotter_option,
)
from engine.cli.ending import Incomplete
from engine.cli.output import View, document, say, short
from engine.cli.running import run
from engine.cli.timings import tell_timings, timings_option
from engine.errors import InvalidArgument, NotSupported, printable
from engine.importing import ImportResult
from engine.kv.schema import Image
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.phases import Timings, total
from engine.stores import Stores
from engine.unpack.unpacker import Unpacked

__all__ = ["default_backend", "import_"]

_SHOWN = 20  # lines of one kind; an index may list 10,000


@click.command("import")
@click.argument("path", type=click.Path(readable=False, allow_dash=True))
@click.option(
    "--ref", "refs", multiple=True, metavar="NAME", help="Take only this image; may be repeated."
)
@click.option("--name", help="Name of the image, instead of what its archive says.")
@snapshotter_option
@platform_option
@click.option("--no-unpack", is_flag=True, help="Only store the image.")
@click.option("--strict", is_flag=True, help="Refuse a media type that disagrees with the bytes.")
@replace_option
@durability_option
@timings_option
@lease_option
@action
@click.pass_obj
def import_(
    context: Context,
    path: str,
    refs: tuple[str, ...],
    name: str | None,
    snapshotter: str | None,
    platform: Platform | None,
    no_unpack: bool,
    strict: bool,
    replace: bool,
    durability: str,
    timings: bool,
    lease: str,
    view: View,
) -> None:
    """Import the images of a folder or an archive, and unpack them.

    PATH is an OCI layout, an OCI archive, what `docker save` or skopeo's `dir:` writes, told apart by
    content, or `-` for an archive on standard input. --ref chooses by name, by tag or by digest.
    """
    source = _standard_input() if path == "-" else Path(path)

    async def work(engine: Engine) -> tuple[ImportResult, dict[str, Any]]:
        backend = None if no_unpack else snapshotter or default_backend(engine.stores)
        with progress(view) as report:
            result = await engine.using(lease).import_image(
                source,
                name=name,
                refs=refs,
                snapshotter=backend,
                platform=platform,
                strict=strict,
                replace=replace,
                report=report,
            )
        return result, _shape(engine.stores, result, backend)

    result, shown = run(context, work, create=True, durability=durability)
    _tell(result, view)
    if timings:
        tell_timings(view, _timings(result))
    if not view.json:
        _say([f"lamina: {one.error}" for one in result.failed[1:]], say)  # the first ends the command
    if result.failed:
        raise Incomplete(result.failed[0].error, shown)
    if view.json:
        document(shown)


def _standard_input() -> int:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgument("there is no archive on standard input; pipe one to `lamina import -`")
    return sys.stdin.fileno()


def default_backend(stores: Stores) -> str:
    """Return the backend that is unpacked for where none is named. Raises NotSupported."""
    try:
        return stores.snapshotter().name
    except NotSupported as error:
        raise NotSupported(f"{error}; add --no-unpack to only store the image") from None


def _shape(stores: Stores, result: ImportResult, snapshotter: str | None) -> dict[str, Any]:
    """Return what came of an import: images, what is none, what failed, and how it was unpacked."""
    return {
        "images": [*map(shapes.images(stores), result.images)],
        "passed_over": [asdict(one) for one in result.passed_over],
        "failed": [
            {"name": one.name, "digest": one.digest, "error": printable(str(one.error), 4000)}
            for one in result.failed
        ],
        "timings": _timings(result),
        "unpacked": [
            {"digest": digest, "snapshotter": snapshotter, **asdict(unpacked)}
            for digest, unpacked in result.unpacked.items()
        ],
    }


def _timings(result: ImportResult) -> Timings:
    return total(result.timings, *(unpacked.timings for unpacked in result.unpacked.values()))


def _tell(result: ImportResult, view: View) -> None:
    kinds = (
        [_imported(image, result.unpacked.get(image.target.digest)) for image in result.images],
        [note for unpacked in result.unpacked.values() for note in unpacked.mistyped],
        [f"passed over {one.name or short(one.digest)}: {one.reason}" for one in result.passed_over],
    )
    for lines in kinds:
        _say(lines, view.tell)


def _say(lines: Sequence[str], tell: Callable[[str], None]) -> None:
    for line in lines[:_SHOWN]:
        tell(line)
    if len(lines) > _SHOWN:
        tell(f"and {len(lines) - _SHOWN} more such; --json lists them")


def _imported(image: Image, unpacked: Unpacked | None) -> str:
    left_out = unpacked.xattrs_left_out if unpacked else 0
    more = f", {left_out} xattrs left out" if left_out else ""
    return f"imported {familiar(image.name)} ({short(image.target.digest)}){more}"
