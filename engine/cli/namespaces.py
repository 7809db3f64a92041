"""Commands on namespaces: namespaces ls|create|rm."""

import click

from engine.cli import shapes
from engine.cli.completion import namespace_names
from engine.cli.context import Context, action, listing
from engine.cli.labelling import Labelled, labels_argument
from engine.cli.output import View, age, document, write
from engine.cli.table import Column, Fault

__all__ = ["create", "list_namespaces", "remove"]


@click.command("ls")
@listing
@click.pass_obj
def list_namespaces(context: Context, view: View) -> None:
    """List the namespaces.

    That is those which have something in them, or were made.
    """
    with context.reading() as stores:
        found, damaged = stores.namespaces.walk(), stores.namespaces.damaged()
    if view.quiet:
        write([*(record.name for record in found), *(lost.name for lost in damaged)])
        return
    if view.json:
        lost = [shapes.ShownNamespace(name=lost.name, error=lost.error) for lost in damaged]
        document([*map(shapes.namespace, found), *lost])
        return
    view.table(
        (
            Column("NAME"),
            Column("CONTENT", goes=2),
            Column("CREATED", goes=3),
            Column("LABELS", goes=1, least=12),
        ),
        [
            (
                record.name,
                "isolated" if record.isolated else "shared",
                age(record.created) if record.created else "-",
                ",".join(f"{key}={value}" for key, value in record.labels.items()) or "-",
            )
            for record in found
        ],
        [Fault(lost.name, lost.error) for lost in damaged],
        none="no namespaces",
    )


@click.command("create")
@click.argument("name")
@labels_argument
@click.option("--isolated", is_flag=True, help="Share no blobs with other namespaces.")
@action
@click.pass_obj
def create(context: Context, name: str, about: Labelled, isolated: bool, view: View) -> None:
    """Make a namespace before anything is in it.

    It gets labels as KEY=VALUE. But for --isolated there is no need to: `lamina --namespace NAME import`
    makes one, too.
    """
    with context.stores() as stores:
        record = stores.namespaces.create(name, isolated=isolated, labels=about)
    if view.json:
        document(shapes.namespace(record))


@click.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=namespace_names)
@action
@click.pass_obj
def remove(context: Context, names: tuple[str, ...], view: View) -> None:
    """Remove namespaces that have nothing in them any more."""
    found = list(dict.fromkeys(names))
    with context.stores() as stores:
        stores.namespaces.remove(*found)
    if view.json:
        document({"removed": found})
