"""The command `content verify`."""

import click

from engine.cli.bars import progress
from engine.cli.completion import blob_names
from engine.cli.context import Context, action
from engine.cli.ending import Incomplete
from engine.cli.output import View, counted, document, human_bytes, say
from engine.errors import DataLoss, NotFound
from engine.oci.digest import parse_digest
from engine.progress import Step

__all__ = ["verify"]


@click.command("verify")
@click.argument("digests", nargs=-1, shell_complete=blob_names)
@action
@click.pass_obj
def verify(context: Context, digests: tuple[str, ...], view: View) -> None:
    """Hash blobs again, all of them by default."""
    damaged: list[str] = []
    checked = gone = 0
    with context.reading() as stores, progress(view) as report:
        content = stores.content
        blobs = [content.info(content.find(digest)) for digest in digests] or list(content.walk())
        for blob in blobs:
            report(Step.VERIFY, blob.digest, blob.size, 0)
            try:
                checked += content.verify(parse_digest(blob.digest))
            except DataLoss as error:
                damaged.append(blob.digest)
                say(f"lamina: {error}")
            except NotFound:
                if digests:
                    raise
                gone += 1  # collected meanwhile
            report(Step.VERIFY, blob.digest, blob.size, blob.size)
    there = len(blobs) - gone
    found = {"blobs": there, "bytes": checked, "damaged": damaged}
    view.tell(f"{there - len(damaged)} of {counted(there, 'blob')} good, {human_bytes(checked)}")
    if damaged:
        raise Incomplete(DataLoss(f"{counted(len(damaged), 'blob')} damaged"), found)
    if view.json:
        document(found)
