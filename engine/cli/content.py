"""Commands on blobs: content ls|get|rm."""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain

import click

from engine.cli import shapes
from engine.cli.completion import blob_names
from engine.cli.context import Context, action, filter_option, listing
from engine.cli.ending import Incomplete
from engine.cli.output import View, age, document, documents, human_bytes, write
from engine.cli.table import Column, Fault
from engine.errors import EngineError
from engine.filters import Filter
from engine.kv.schema import Blob
from engine.kv.table import Damaged

__all__ = ["get", "list_blobs", "remove"]


@click.command("ls")
@filter_option
@listing
@click.pass_obj
def list_blobs(context: Context, filters: Sequence[Filter], view: View) -> None:
    """List the blobs.

    Fields to filter by: digest, labels.
    """
    with context.reading() as stores:

        def blobs() -> Iterator[Blob]:
            return stores.content.walk(filters)

        def lost() -> Iterator[Damaged]:  # looked for when the others are shown
            yield from () if filters else stores.content.damaged()

        names = chain((blob.digest for blob in blobs()), (record.name for record in lost()))
        if view.quiet:
            write(names)
            return
        if view.json:
            faults = (shapes.ShownBlob(digest=record.name, error=record.error) for record in lost())
            documents(chain(map(shapes.blob, blobs()), faults))
            return
        short = view.shortener(names)
        view.table(
            (Column("DIGEST"), Column("SIZE", goes=2, right=True), Column("CREATED", goes=1)),
            ((short(blob.digest), human_bytes(blob.size), age(blob.created)) for blob in blobs()),
            (Fault(short(record.name), record.error) for record in lost()),
            none="no blobs match" if filters else "no blobs",
        )


@click.command("get")
@click.argument("digest", shell_complete=blob_names)
@click.pass_obj
def get(context: Context, digest: str) -> None:
    """Write a blob to stdout, verified on the way."""
    with context.reading() as stores:
        for piece in stores.content.read_verified(stores.content.find(digest)):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@click.command("rm")
@click.argument("digests", nargs=-1, required=True, shell_complete=blob_names)
@action
@click.pass_obj
def remove(context: Context, digests: tuple[str, ...], view: View) -> None:
    """Remove blobs that no image needs."""
    removed: list[str] = []
    with context.stores() as stores:
        # All are looked up before one goes: fewer would be left to tell short forms from.
        found = [stores.content.find(digest) for digest in digests]
        try:
            for digest in found:
                stores.remove_blob(digest)
                removed.append(digest)
        except EngineError as error:
            raise Incomplete(error, {"removed": removed}) from error
    if view.json:
        document({"removed": removed})
