"""Commands on snapshots: snapshots ls|tree|usage|rm."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import click

from engine.cli.context import Context, as_json, snapshotter_option
from engine.cli.output import (
    Tree,
    age,
    console,
    escape,
    human_bytes,
    print_json,
    print_table,
    resisting,
    say,
)
from engine.errors import EngineError, FailedPrecondition
from engine.snapshots import Info, Snapshotter
from engine.stores import Stores

__all__ = ["COMMANDS"]


def _chosen(stores: Stores, name: str | None) -> Sequence[Snapshotter]:
    return [stores.snapshotter(name)] if name else stores.snapshotters()


def _holding(stores: Stores, name: str | None, key: str) -> Snapshotter:
    """Return the backend that was named, or else the one that has the snapshot `key`."""
    return stores.snapshotter(name) if name else stores.holder(key)


@click.group("snapshots")
def snapshots_group() -> None:
    """List, draw, measure and remove snapshots."""


@snapshots_group.command("ls")
@snapshotter_option
@as_json
@click.pass_obj
def list_snapshots(context: Context, snapshotter: str | None, as_json: bool) -> None:
    """List the snapshots."""
    with context.reading() as stores:
        rows = list(_rows(stores, snapshotter))
    if as_json:
        print_json(rows)
        return
    found = [(row["snapshotter"], row["info"]) for row in rows if "info" in row]
    print_table(
        ("SNAPSHOTTER", "KIND", "CREATED", "KEY", "PARENT"),
        [(name, i.kind, age(i.created), i.key, i.parent or "-") for name, i in found],
    )
    _tell_errors(rows)


def _tell_errors(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if "error" in row:
            say(f"lamina: {row['snapshotter']}: {row['error']}")


def _rows(stores: Stores, name: str | None) -> Iterator[dict[str, Any]]:
    """Give a row for each snapshot, and one with the error for each backend that cannot tell."""
    for backend in _chosen(stores, name):
        try:
            yield from ({"snapshotter": backend.name, "info": info} for info in backend.walk())
        except EngineError as error:
            yield {"snapshotter": backend.name, "error": str(error)}
    if not name:
        yield from ({"snapshotter": broken, "error": why} for broken, why in stores.broken.items())


@snapshots_group.command("tree")
@snapshotter_option
@click.pass_obj
def tree(context: Context, snapshotter: str | None) -> None:
    """Draw what stands on what, and how much each takes up by itself."""
    with context.reading() as stores:
        rows = list(_rows(stores, snapshotter))
        for backend in _chosen(stores, snapshotter):
            infos = [row["info"] for row in rows if row["snapshotter"] == backend.name and "info" in row]
            if infos:
                console.print(_drawing(backend, infos))
    _tell_errors(rows)


def _drawing(backend: Snapshotter, infos: Sequence[Info]) -> Tree:
    children: defaultdict[str, list[Info]] = defaultdict(list)
    for info in infos:
        children[info.parent].append(info)
    drawing = Tree(f"[bold]{backend.name}[/bold]")
    pending = [(drawing, info) for info in children[""]]
    while pending:
        above, info = pending.pop(0)
        size = human_bytes(backend.usage(info.key).size)
        node = above.add(f"{escape(info.key)}  [dim]{info.kind}, {size}[/dim]")
        pending += [(node, child) for child in children[info.key]]
    return drawing


@snapshots_group.command("usage")
@click.argument("keys", nargs=-1)
@snapshotter_option
@as_json
@click.pass_obj
def usage(context: Context, keys: tuple[str, ...], snapshotter: str | None, as_json: bool) -> None:
    """Show what snapshots take up, their parents left out; all of them by default."""
    with context.reading() as stores:
        found = [] if keys else list(_rows(stores, snapshotter))
        chosen = [(_holding(stores, snapshotter, key), key) for key in keys] or [
            (stores.snapshotter(row["snapshotter"]), row["info"].key) for row in found if "info" in row
        ]
        rows = [(backend.name, key, backend.usage(key)) for backend, key in chosen]
    broken = [row for row in found if "error" in row]
    if as_json:
        print_json([*({"snapshotter": s, "key": k, "usage": u} for s, k, u in rows), *broken])
        return
    print_table(
        ("SNAPSHOTTER", "SIZE", "INODES", "KEY"),
        [(name, human_bytes(use.size), str(use.inodes), key) for name, key, use in rows],
    )
    _tell_errors(broken)


@snapshots_group.command("rm")
@click.argument("keys", nargs=-1, required=True)
@snapshotter_option
@click.pass_obj
def remove(context: Context, keys: tuple[str, ...], snapshotter: str | None) -> None:
    """Remove snapshots that nothing stands on, writable mounts that are kept among them."""
    with context.stores() as stores:
        left = stores.remove_snapshots([(_holding(stores, snapshotter, key), key) for key in keys])
    if left:
        raise FailedPrecondition(resisting(left))


COMMANDS = (snapshots_group,)
