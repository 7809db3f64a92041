"""The command `image inspect`: what an image is made of, and how whoever made it wants it run.

Sync. Its config is the image's own text: nothing in it is taken for granted, all is escaped and bounded.
"""

import json
from collections.abc import Iterator, Sequence

import click
import msgspec

from engine import limits
from engine.cli import shapes
from engine.cli.completion import image_names
from engine.cli.context import Context, listing, platform_option
from engine.cli.ending import Incomplete
from engine.cli.output import View, document, human_bytes, write
from engine.cli.table import Column
from engine.content.image import ResolvedImage
from engine.errors import DataLoss, NotFound, Refused, printable
from engine.images.states import parts_of
from engine.kv.schema import Image
from engine.oci.digest import Digest
from engine.oci.documents import decode_json
from engine.oci.execution import read_execution
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = ["inspect"]

_MOST = 100  # values of one kind that are shown to people
_LONGEST = 2000
Facts = Iterator[tuple[str, Sequence[str]]]


@click.command("inspect")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@platform_option
@listing
@click.pass_obj
def inspect(context: Context, name: str, platform: Platform | None, view: View) -> None:
    """Show what an image is made of and how it is run."""
    with context.reading() as stores:
        image = stores.images.get(name)
        resolved = _resolved(stores, image, platform)
        manifest = _document(stores, "manifest", resolved.path[-1].key, limits.MANIFEST)
        config = _document(stores, "config", resolved.manifest.config.key, limits.CONFIG)
        parts = parts_of(stores, resolved)
        about = msgspec.structs.replace(
            shapes.image(stores, image), unpacked=parts.unpacked, uses=sorted(parts.uses)
        )
    shown = shapes.details(about, resolved, manifest, config)
    if view.json and not about.error:
        document(shown)
    elif view.quiet:
        write([image.target.digest])
    elif not view.json:
        _print_facts([*_facts(about, resolved), *_run_facts(config)])
        _print_layers(view, resolved)
        _print_history(view, resolved, config.get("history") if isinstance(config, dict) else None)
    if about.error:
        error = DataLoss(f"image {familiar(image.name)}: {about.error}")
        raise Incomplete(error, msgspec.to_builtins(shown))


def _document(stores: Stores, what: str, key: Digest, limit: int) -> object:
    """Return a document of an image as it is stored."""
    return decode_json(stores.content.read_all(key, limit), f"{what} {key}", limit)


def _resolved(stores: Stores, image: Image, platform: Platform | None) -> ResolvedImage:
    """Return an image for a platform or, where none is asked for, for one that is here."""
    if platform:
        return stores.resolve(image.target, platform)
    found = stores.present(image.target)
    if not found:
        raise NotFound(f"nothing of image {familiar(image.name)} is in the store; import it again")
    return found[0]


def _facts(about: shapes.ShownImage, resolved: ResolvedImage) -> Facts:
    yield "IMAGE", [familiar(about.name)]
    yield "DIGEST", [str(about.digest)]
    yield "PLATFORM", [str(resolved.config.platform)]
    if about.platforms and len(about.platforms) > 1:
        yield "ALSO FOR", [one for one in about.platforms if one != str(resolved.config.platform)]
    yield "CREATED", [resolved.config.created or "-"]
    yield "CONFIG", [resolved.manifest.config.digest]
    yield "UNPACKED", [", ".join(about.unpacked or ()) or "-"]
    yield "GOOD FOR", [", ".join(about.uses or ()) or "-"]


def _run_facts(config: object) -> Facts:
    """Yield what a config says of running the image, or why it cannot be run."""
    try:
        run = read_execution(config)
    except Refused as error:
        yield "NO RUN", [str(error)]
        return
    for title, words in (("ENTRYPOINT", run.entrypoint), ("COMMAND", run.cmd)):
        if words:
            yield title, [json.dumps(words, ensure_ascii=False)]
    texts = (("USER", run.user), ("WORKDIR", run.working_dir), ("STOP SIGNAL", run.stop_signal))
    for title, text in texts:
        if text:
            yield title, [text]
    for title, several in (("PORTS", run.exposed_ports), ("VOLUMES", run.volumes)):
        if several:
            yield title, [", ".join(several)]
    if run.env:
        yield "ENVIRONMENT", run.env
    if run.labels:
        yield "LABELS", [f"{key}={value}" for key, value in run.labels.items()]


def _print_facts(facts: Sequence[tuple[str, Sequence[str]]]) -> None:
    wide = max(len(title) for title, _ in facts)
    for title, values in facts:
        shown = [printable(value, _LONGEST) for value in values[:_MOST]]
        if len(values) > _MOST:
            shown.append(f"… and {len(values) - _MOST} more, which --json shows")
        for at, line in enumerate(shown):
            click.echo(click.style(f"{'' if at else title:<{wide}}  ", bold=True) + line)


def _print_layers(view: View, resolved: ResolvedImage) -> None:
    digests = [layer.descriptor.digest for layer in resolved.layers]
    short, short_chain = view.shortener(digests), view.shortener(resolved.chain)
    columns = (
        Column("LAYER"),
        Column("SIZE", goes=2, right=True),
        Column("PACKED", goes=1),
        Column("CHAIN ID", goes=3),
    )
    rows = [
        (
            short(layer.descriptor.digest),
            human_bytes(layer.descriptor.size),
            layer.compression,
            short_chain(chain),
        )
        for layer, chain in zip(resolved.layers, resolved.chain, strict=True)
    ]
    if rows:
        click.echo()
        view.table(columns, rows, none="")


def _print_history(view: View, resolved: ResolvedImage, history: object) -> None:
    steps = [step for step in history if isinstance(step, dict)] if isinstance(history, list) else []
    if not steps:
        return
    digests = [layer.descriptor.digest for layer in resolved.layers]
    short, left = view.shortener(digests), iter(digests)
    rows = [
        (
            "-" if step.get("empty_layer") is True else short(next(left, "?")),
            str(step.get("created") or "-")[: len("2026-11-21")],
            " ".join(str(step.get("created_by") or step.get("comment") or "-").split()),
        )
        for step in steps[:_MOST]
    ]
    click.echo()
    columns = (Column("LAYER"), Column("CREATED", goes=1), Column("CREATED BY", goes=2, least=12))
    view.table(columns, rows, none="")
    if len(steps) > _MOST:
        click.echo(f"… and {len(steps) - _MOST} steps more, which --json shows")
