"""The command `import`."""

import sys
from itertools import islice
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
from engine.errors import InvalidArgument, NotSupported, printable
from engine.importing import ImportResult
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["COMMANDS"]

_SHOWN = 20  # lines of one kind; an index may list 10,000


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path, readable=False, allow_dash=True))
@click.option("--ref", "refs", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
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
    refs: tuple[str, ...],
    name: str | None,
    snapshotter: str | None,
    platform: Platform,
    no_unpack: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Import images and unpack them.

    PATH is an OCI layout, an OCI archive, what `docker save` or skopeo's `dir:` writes, or `-` for an
    archive on standard input. --ref chooses by name, by tag or by digest.
    """
    source = _standard_input() if path == Path("-") else path

    async def work(engine: Engine) -> ImportResult:
        backend = None if no_unpack else snapshotter or _default(engine.stores)
        with progress() as report:
            return await engine.import_image(
                source,
                name=name,
                refs=refs,
                snapshotter=backend,
                platform=platform,
                replace=replace,
                report=report,
            )

    result = context.run(work, create=True)
    if as_json:
        print_json(_document(result))
    else:
        _tell(result)
    if result.failed:
        raise result.failed[0].error


def _standard_input() -> int:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgument("standard input has no archive; pipe one in: `... | lamina import -`")
    return sys.stdin.fileno()


def _default(stores: Stores) -> str:
    try:
        return plugins.default_name(stores.root)
    except NotSupported as error:
        raise NotSupported(f"{error}; add --no-unpack to only store the image") from None


def _tell(result: ImportResult) -> None:
    lines = [
        [f"imported {familiar(image.name)} ({short(image.target.digest)})" for image in result.images],
        [
            f"passed over {printable(one.name) or short(one.digest)}: {one.reason}"
            for one in result.passed_over
        ],
        [f"lamina: {one.error}" for one in result.failed[1:]],  # the first ends the command
    ]
    for kind in lines:
        for line in islice(kind, _SHOWN):
            say(line)
        if len(kind) > _SHOWN:
            say(f"and {len(kind) - _SHOWN} more; --json lists them")


def _document(result: ImportResult) -> dict[str, object]:
    return {
        "images": [{"name": image.name, "digest": image.target.digest} for image in result.images],
        "passed_over": [
            {"name": one.name, "digest": one.digest, "reason": one.reason} for one in result.passed_over
        ],
        "failed": [
            {"name": one.name, "digest": one.digest, "error": str(one.error)} for one in result.failed
        ],
    }


COMMANDS = (import_,)
