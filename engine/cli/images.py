"""Commands on the names of images: images, image tag."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import click

from engine.cli import shapes
from engine.cli.completion import image_names
from engine.cli.context import Context, action, filter_option, listing, replace_option
from engine.cli.output import View, age, document, documents, human_bytes, write
from engine.cli.table import Column, Fault
from engine.filters import Fields, Filter, fields, matches
from engine.images.states import pulls
from engine.kv.schema import Image
from engine.kv.table import Damaged
from engine.oci.reference import familiar

__all__ = ["images", "tag"]

_COLUMNS = (
    Column("NAME"),
    Column("DIGEST", goes=6),
    Column("PLATFORM", goes=4),
    Column("LAYERS", goes=1, right=True),
    Column("SIZE", goes=5, right=True),
    Column("UPDATED", goes=3),
    Column("UNPACKED", goes=2),
)


@click.command("images")
@click.option("-a", "--all", "everything", is_flag=True, help="Also pulls that are not at their end.")
@filter_option
@listing
@click.pass_obj
def images(context: Context, everything: bool, filters: Sequence[Filter], view: View) -> None:
    """List the images.

    Fields to filter by: name, target.digest, target.mediatype, labels.
    """
    with context.reading() as stores:
        records = [image for image in stores.images.walk() if matches(filters, _fields(image))]
        damaged = [] if filters else stores.images.damaged()
        if view.quiet:
            names = [*(record.name for record in records), *(lost.name for lost in damaged)]
            write(map(familiar, names))
            return
        rows = map(shapes.images(stores), records)
        coming = map(shapes.pull, pulls(stores)) if everything else ()
        if view.json:
            lost = (shapes.ShownImage(name=lost.name, error=lost.error) for lost in damaged)
            documents(chain(rows, coming, lost))
        else:
            none = "no images match" if filters else "no images; `lamina import PATH` brings some in"
            _print(view, records, rows, coming, damaged, none)


def _fields(image: Image) -> Fields:
    values = {
        "name": image.name,
        "target.digest": image.target.digest,
        "target.mediatype": image.target.media_type,
    }
    return fields(values, image.labels)


def _print(
    view: View,
    records: Sequence[Image],
    rows: Iterator[shapes.ShownImage],
    coming: Iterable[shapes.ShownImage],
    damaged: Sequence[Damaged],
    none: str,
) -> None:
    short = view.shortener(
        digest for record in records for digest in (record.target.digest, _digest_of_name(record.name))
    )
    faults: list[Fault] = []

    def cells() -> Iterator[Sequence[str]]:
        for record, row in zip(records, rows, strict=True):
            if row.error:
                faults.append(Fault(familiar(row.name), str(row.error)))
                continue
            yield (
                _shown(row.name, short),
                short(record.target.digest),
                ", ".join(row.platforms or ()),
                str(row.layers),
                human_bytes(row.size or 0),
                age(record.updated),
                ", ".join(row.unpacked or ()) or "-",
            )
        for row in coming:
            yield _coming(row, short)

    lost = (Fault(familiar(record.name), record.error) for record in damaged)
    view.table(_COLUMNS, cells(), chain(faults, lost), none=none)


def _coming(row: shapes.ShownImage, short: Callable[[str], str]) -> Sequence[str]:
    size, fetched = row.size or 0, row.fetched or 0
    how = f"{row.state}, {100 * fetched // size} %" if size else str(row.state)
    digest = short(row.digest) if row.digest else "-"
    return _shown(row.name, short), digest, "", "", human_bytes(size), "", how


def _digest_of_name(name: str) -> str:
    return name.rpartition("@")[2]


def _shown(name: str, short: Callable[[str], str]) -> str:
    """Return a name as people type it, a digest in it short: it would push all else off the screen."""
    digest = _digest_of_name(name)
    return familiar(name).removesuffix(digest) + short(digest) if digest != name else familiar(name)


@click.command("tag")
@click.argument("name", metavar="IMAGE", shell_complete=image_names)
@click.argument("new_name")
@replace_option
@action
@click.pass_obj
def tag(context: Context, name: str, new_name: str, replace: bool, view: View) -> None:
    """Give an image another name."""
    with context.stores() as stores:
        target = stores.images.get(name).target
        (image,) = stores.images.put_all({new_name: target}, replace=replace)
        if view.json:
            document(shapes.image(stores, image))
