"""Commands on leases: leases ls|create|inspect|rm."""

from collections.abc import Sequence

import click

from engine import labels, times
from engine.cli import shapes
from engine.cli.completion import lease_ids
from engine.cli.context import Context, action, filter_option, listing
from engine.cli.labelling import Labelled, labels_argument
from engine.cli.output import View, age, counted, document, span, write
from engine.cli.table import Column, Fault
from engine.errors import InvalidArgument, printable
from engine.filters import Filter
from engine.kv.schema import Lease, now
from engine.metadata.leases import expiry

__all__ = ["create", "inspect", "list_leases", "remove"]

_ROUNDING = 30 * 10**9  # nanoseconds: what was just made for a day expires in 24 h, not in 23


@click.command("ls")
@filter_option
@listing
@click.pass_obj
def list_leases(context: Context, filters: Sequence[Filter], view: View) -> None:
    """List the leases.

    Fields to filter by: id, labels.
    """
    with context.reading() as stores:
        found = stores.leases.walk(filters)
        damaged = [] if filters else stores.leases.damaged()
        rows = [shapes.lease(stores, lease) for lease in found]
    if view.quiet:
        write([*(lease.id for lease in found), *(lost.name for lost in damaged)])
        return
    if view.json:
        document([*rows, *(shapes.ShownLease(id=lost.name, error=lost.error) for lost in damaged)])
        return
    view.table(
        (
            Column("ID"),
            Column("HOLDS", goes=4, right=True),
            Column("CREATED", goes=2),
            Column("EXPIRES", goes=5),
            Column("OWNER", goes=3),
            Column("LABELS", goes=1, least=12),
        ),
        [
            (
                row.id,
                str(row.holds),
                age(lease.created),
                _expires(lease, row),
                row.owner or "-",
                _labels(lease),
            )
            for lease, row in zip(found, rows, strict=True)
        ],
        [Fault(lost.name, lost.error) for lost in damaged],
        none="no leases match" if filters else "no leases",
    )


def _expires(lease: Lease, row: shapes.ShownLease) -> str:
    at = expiry(lease)
    if not row.live:
        return "ended"
    return f"in {span(at - now() + _ROUNDING)}" if at is not None else "-"


def _labels(lease: Lease) -> str:
    """Return labels in a few words: when it expires has a column of its own."""
    about = {key: value for key, value in lease.labels.items() if key != labels.GC_EXPIRE}
    return ",".join(f"{key}={value}" for key, value in about.items()) or "-"


def _life(_context: click.Context, _parameter: click.Parameter, text: str) -> int | None:
    """Return how long a lease is to live from now on, None for ever."""
    length, moment = times.duration(text), times.moment(text)
    if length == 0:
        return None
    life = length if moment is None else moment - now()
    if life is None or life < 0:
        raise InvalidArgument(
            f"--expires {printable(text)!r}: write a duration as 1h30m, a time to come as "
            "2026-01-02T15:04:05Z, or 0 for never"
        )
    return life


@click.command("create")
@labels_argument
@click.option("--id", "name", metavar="ID", default="", help="What to call it, instead of a random ID.")
@click.option(
    "-x",
    "--expires",
    "life",
    metavar="DURATION",
    default="24h",
    show_default=True,
    callback=_life,
    help="How long it lives, or until when; 0 for ever.",
)
@click.option("--flat", is_flag=True, help="Keep what it holds, but not what labels of that refer to.")
@action
@click.pass_obj
def create(
    context: Context, about: Labelled, name: str, life: int | None, flat: bool, view: View
) -> None:
    """Make a lease, and print its ID.

    What `lamina import --lease ID` brings in, and `unpack --lease ID` makes, then stays until the
    lease expires or is removed, whatever names it has. The lease gets labels as KEY=VALUE.
    """
    flatness = {labels.GC_FLAT: "true"} if flat else {}
    with context.stores() as stores:
        lease = stores.leases.create(name, life=life, labels={**flatness, **about})
        shown = shapes.lease(stores, lease)
    if view.json:
        document(shown)
    else:
        write([lease.id])


@click.command("inspect")
@click.argument("name", metavar="ID", shell_complete=lease_ids)
@listing
@click.pass_obj
def inspect(context: Context, name: str, view: View) -> None:
    """Show what a lease holds."""
    with context.reading() as stores:
        shown = shapes.lease_details(stores, stores.leases.get(name))
    if view.json:
        document(shown)
        return
    if view.quiet:
        write(held.id for held in shown.resources)
        return
    short = view.shortener(held.id for held in shown.resources)
    view.table(
        (Column("TYPE"), Column("ID")),
        [(held.type, short(held.id)) for held in shown.resources],
        none=f"lease {name} holds nothing",
    )


@click.command("rm")
@click.argument("names", metavar="ID...", nargs=-1, required=True, shell_complete=lease_ids)
@action
@click.pass_obj
def remove(context: Context, names: tuple[str, ...], view: View) -> None:
    """Remove leases; `lamina gc` then frees what only they held."""
    ids = list(dict.fromkeys(names))
    with context.stores() as stores:
        stores.leases.delete(*ids)
    if view.json:
        document({"removed": ids})
    else:
        view.tell(f"removed {counted(len(ids), 'lease')}")
