"""Commands on labels: image label|pin|unpin, content label, snapshots label, namespaces label."""

from collections.abc import Mapping

import click

from engine import labels
from engine.cli import shapes
from engine.cli.completion import blob_names, image_names, namespace_names, snapshot_names
from engine.cli.context import Command, Context, action, snapshotter_option
from engine.cli.output import View, document, write
from engine.errors import InvalidArgument, printable

__all__ = [
    "Labelled",
    "label_blob",
    "label_image",
    "label_namespace",
    "label_snapshot",
    "labels_argument",
    "pin",
    "unpin",
]

Labelled = Mapping[str, str]
"""Labels by key; an empty value deletes one."""

_SHOWN = 4200  # of a label, which has 4096 bytes at most


def _parse(_context: click.Context, _parameter: click.Parameter, words: tuple[str, ...]) -> Labelled:
    return dict(map(_change, words))


def _change(word: str) -> tuple[str, str]:
    key, is_set, value = word.partition("=")
    if not is_set and key.endswith("-"):
        key = key.removesuffix("-")
    elif not is_set:
        key = ""
    if not key:
        raise InvalidArgument(
            f"{printable(word)!r} is no label; write KEY=VALUE to set one, KEY- to delete it"
        )
    return key, value


labels_argument = click.argument("about", metavar="[KEY=VALUE]...", nargs=-1, callback=_parse)
_changes = click.argument("changes", metavar="[KEY=VALUE|KEY-]...", nargs=-1, callback=_parse)


def _labelling(command: Command) -> Command:
    """Give a command the changes to labels as its argument `changes`."""
    return _changes(action(click.pass_obj(command)))


def _show(view: View, about: Labelled, shape: object) -> None:
    if view.json:
        document(shape)
    elif not view.quiet:
        write(printable(f"{key}={value}", _SHOWN) for key, value in sorted(about.items()))


@click.command("label")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@_labelling
def label_image(context: Context, name: str, changes: Labelled, view: View) -> None:
    """Show, set and delete labels of an image name.

    KEY=VALUE sets one, KEY- deletes one; shown are those that it has then.
    """
    with context.stores() if changes else context.reading() as stores:
        image = stores.images.label(changes, name)[0] if changes else stores.images.get(name)
        shown = shapes.image(stores, image) if view.json else None
    _show(view, image.labels, shown)


@click.command("label")
@click.argument("digest", shell_complete=blob_names)
@_labelling
def label_blob(context: Context, digest: str, changes: Labelled, view: View) -> None:
    """Show, set and delete labels of a blob.

    KEY=VALUE sets one, KEY- deletes one; shown are those that it has then.
    """
    with context.stores() if changes else context.reading() as stores:
        found = stores.content.find(digest)
        blob = stores.content.update(found, changes) if changes else stores.content.info(found)
    _show(view, blob.labels, shapes.blob(blob))


@click.command("label")
@click.argument("key", shell_complete=snapshot_names)
@snapshotter_option
@_labelling
def label_snapshot(
    context: Context, key: str, snapshotter: str | None, changes: Labelled, view: View
) -> None:
    """Show, set and delete labels of a snapshot.

    KEY=VALUE sets one, KEY- deletes one; shown are those that it has then.
    """
    with context.stores() if changes else context.reading() as stores:
        backend, found = stores.find_snapshot(key, snapshotter)
        info = backend.update(found, changes) if changes else backend.stat(found)
    _show(view, info.labels, shapes.snapshot(backend.name, info))


@click.command("label")
@click.argument("name", shell_complete=namespace_names)
@_labelling
def label_namespace(context: Context, name: str, changes: Labelled, view: View) -> None:
    """Show, set and delete labels of a namespace.

    KEY=VALUE sets one, KEY- deletes one; shown are those that it has then.
    """
    with context.stores() if changes else context.reading() as stores:
        record = stores.namespaces.update(name, changes) if changes else stores.namespaces.get(name)
    _show(view, record.labels, shapes.namespace(record))


def _pinning(context: Context, names: tuple[str, ...], value: str, view: View) -> None:
    with context.stores() as stores:
        images = stores.images.label({labels.PINNED: value}, *names)
        shown = [*map(shapes.images(stores), images)] if view.json else []
    if view.json:
        document(shown)


_images = click.argument(
    "names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=image_names
)


@click.command("pin")
@_images
@action
@click.pass_obj
def pin(context: Context, names: tuple[str, ...], view: View) -> None:
    """Keep image names from every policy that removes some.

    `image rm` still removes them.
    """
    _pinning(context, names, labels.PINNED_VALUE, view)


@click.command("unpin")
@_images
@action
@click.pass_obj
def unpin(context: Context, names: tuple[str, ...], view: View) -> None:
    """Leave image names to policies again."""
    _pinning(context, names, "", view)
