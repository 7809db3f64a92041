"""Commands on blobs: content ls|get|rm|verify."""

import sys

import click

from engine.cli.context import Context, as_json
from engine.cli.output import age, human_bytes, print_json, print_table, progress, say
from engine.errors import DataLoss, InvalidArgument, NotFound, Refused
from engine.oci.digest import Digest, parse_digest
from engine.progress import Step

__all__ = ["COMMANDS"]


def _digest(_context: click.Context, _parameter: click.Parameter, text: str) -> Digest:
    try:
        return parse_digest(text)
    except Refused as error:
        raise InvalidArgument(f"{error}; `lamina content ls` lists them") from None


def _digests(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[Digest]:
    return [_digest(context, parameter, text) for text in texts]


@click.group("content")
def content_group() -> None:
    """List, read, check and remove blobs."""


@content_group.command("ls")
@as_json
@click.pass_obj
def list_blobs(context: Context, as_json: bool) -> None:
    """List the blobs."""
    with context.reading() as stores:
        blobs = stores.content.walk()
        damaged = stores.content.damaged()
    if as_json:
        print_json(
            [
                *(
                    {"digest": b.digest, "size": b.size, "created": b.created, "labels": b.labels}
                    for b in blobs
                ),
                *({"digest": record.name, "error": record.error} for record in damaged),
            ]
        )
        return
    rows = [(blob.digest, human_bytes(blob.size), age(blob.created)) for blob in blobs]
    rows += [(record.name, "-", record.error) for record in damaged]
    print_table(("DIGEST", "SIZE", "CREATED"), rows)


@content_group.command("get")
@click.argument("digest", callback=_digest)
@click.pass_obj
def get(context: Context, digest: Digest) -> None:
    """Write a blob to stdout, verified on the way."""
    with context.reading() as stores:
        for piece in stores.content.read_verified(digest):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@content_group.command("rm")
@click.argument("digests", nargs=-1, required=True, callback=_digests)
@click.pass_obj
def remove(context: Context, digests: list[Digest]) -> None:
    """Remove blobs that no image needs."""
    with context.stores() as stores:
        for digest in digests:
            stores.remove_blob(digest)


@content_group.command("verify")
@click.argument("digests", nargs=-1, callback=_digests)
@as_json
@click.pass_obj
def verify(context: Context, digests: list[Digest], as_json: bool) -> None:
    """Hash blobs again, all of them by default."""
    damaged: list[str] = []
    checked = gone = 0
    with context.reading() as stores, progress() as report:
        blobs = [stores.content.info(digest) for digest in digests] or stores.content.walk()
        for blob in blobs:
            report(Step.VERIFY, blob.digest, blob.size, 0)
            try:
                checked += stores.content.verify(parse_digest(blob.digest))
            except DataLoss as error:
                damaged.append(blob.digest)
                say(f"lamina: {error}")
            except NotFound:
                if digests:
                    raise
                gone += 1  # collected meanwhile
            report(Step.VERIFY, blob.digest, blob.size, blob.size)
    if as_json:
        print_json({"blobs": len(blobs) - gone, "bytes": checked, "damaged": damaged})
    else:
        there = len(blobs) - gone
        say(f"{there - len(damaged)} of {there} blobs are good, {human_bytes(checked)}")
    if damaged:
        raise DataLoss(f"{len(damaged)} blobs are damaged")


COMMANDS = (content_group,)
