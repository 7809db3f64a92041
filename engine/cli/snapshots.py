"""Commands on snapshots: snapshots ls|tree|usage|rm."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import click
import msgspec

from engine.cli import shapes
from engine.cli.completion import snapshot_names
from engine.cli.context import Context, action, filter_option, listing, snapshotter_option
from engine.cli.ending import Incomplete
from engine.cli.output import View, age, document, documents, human_bytes, resisting, say, write
from engine.cli.table import Column
from engine.errors import EngineError, FailedPrecondition
from engine.filters import Fields, Filter, fields, matches
from engine.snapshots import Info, Snapshotter
from engine.stores import Stores

__all__ = ["list_snapshots", "remove", "tree", "usage"]


class _Found(NamedTuple):
    backend: Snapshotter
    info: Info


class _Survey(NamedTuple):
    """Every snapshot, and what is wrong with each backend that cannot tell."""

    found: list[_Found]
    faults: list[shapes.ShownSnapshot]


_COLUMNS = (
    Column("KEY"),
    Column("SNAPSHOTTER", goes=4),
    Column("KIND", goes=2),
    Column("CREATED", goes=1),
    Column("PARENT", goes=3),
)


def _tell(faults: Sequence[shapes.ShownSnapshot]) -> None:
    for fault in faults:
        say(f"lamina: {fault.snapshotter}: {fault.error}")


def _survey(stores: Stores, name: str | None) -> _Survey:
    faults: list[shapes.ShownSnapshot] = []
    return _Survey([*_walk(stores, name, (), faults)], faults)


def _walk(
    stores: Stores,
    name: str | None,
    filters: Sequence[Filter],
    faults: list[shapes.ShownSnapshot],
) -> Iterator[_Found]:
    """Yield the snapshots that match, and note in `faults` which backends cannot tell."""
    for backend in [stores.snapshotter(name)] if name else stores.snapshotters():
        try:
            for info in backend.walk():
                if matches(filters, _fields(info)):
                    yield _Found(backend, info)
        except EngineError as error:
            faults.append(shapes.ShownSnapshot(snapshotter=backend.name, error=str(error)))
    for broken, why in () if name else stores.broken.items():
        faults.append(shapes.ShownSnapshot(snapshotter=broken, error=why))


def _fields(info: Info) -> Fields:
    return fields({"kind": info.kind, "name": info.key, "parent": info.parent}, info.labels)


@click.command("ls")
@snapshotter_option
@filter_option
@listing
@click.pass_obj
def list_snapshots(
    context: Context, snapshotter: str | None, filters: Sequence[Filter], view: View
) -> None:
    """List the snapshots.

    Fields to filter by: kind, name, parent, labels.
    """
    faults: list[shapes.ShownSnapshot] = []
    with context.reading() as stores:
        found = _walk(stores, snapshotter, filters, faults)
        if view.json:
            documents(chain((shapes.snapshot(backend.name, info) for backend, info in found), faults))
        elif view.quiet:
            write(info.key for _, info in found)
        else:
            short = view.shortener(info.key for _, info in _walk(stores, snapshotter, filters, []))
            rows = (
                (short(i.key), backend.name, i.kind, age(i.created), short(i.parent) or "-")
                for backend, i in found
            )
            view.table(_COLUMNS, rows, none="no snapshots match" if filters else "no snapshots")
    if not view.json:
        _tell(faults)


@click.command("tree")
@snapshotter_option
@listing
@click.pass_obj
def tree(context: Context, snapshotter: str | None, view: View) -> None:
    """Draw what stands on what, and how much each takes up."""
    with context.reading() as stores:
        survey = _survey(stores, snapshotter)
        children: defaultdict[tuple[str, str], list[_Found]] = defaultdict(list)
        for found in survey.found:
            children[found.backend.name, found.info.parent].append(found)
        short = view.shortener(info.key for _, info in survey.found)
        backends = sorted({backend.name for backend, _ in survey.found})
        if view.json:
            forest = [branch for name in backends for branch in _branches(children, name, "")]
            document([*forest, *survey.faults])
            return
        for name in backends:
            write([name])
            write(
                f"{guide}{short(found.info.key)}" + ("" if view.quiet else _about(found))
                for guide, found in _drawn(children, name)
            )
    _tell(survey.faults)


_Children = defaultdict[tuple[str, str], list[_Found]]


def _about(found: _Found) -> str:
    size = human_bytes(found.backend.usage(found.info.key).size)
    return f"  {found.info.kind}, {size}"


def _drawn(children: _Children, name: str) -> Iterator[tuple[str, _Found]]:
    """Yield the snapshots of a backend from the bottom up, each with the lines that lead to it."""
    # Not by recursion: as many may stand on each other as someone commits.
    pending = [("", found, at == 0) for at, found in enumerate(reversed(children[name, ""]))]
    while pending:
        lead, found, is_last = pending.pop()
        yield lead + ("└── " if is_last else "├── "), found
        lead += "    " if is_last else "│   "
        above = reversed(children[name, found.info.key])
        pending += [(lead, child, at == 0) for at, child in enumerate(above)]


def _branches(children: _Children, name: str, parent: str) -> list[dict[str, Any]]:
    """Return the snapshots on a parent, each with those on it as `children`."""
    made: dict[str, dict[str, Any]] = {}
    pending = list(children[name, parent])
    roots = [found.info.key for found in pending]
    while pending:
        backend, info = pending.pop(0)
        shape = shapes.snapshot(name, info, backend.usage(info.key))
        made[info.key] = {**msgspec.to_builtins(shape), "children": []}
        if info.parent in made:
            made[info.parent]["children"].append(made[info.key])
        pending += children[name, info.key]
    return [made[key] for key in roots]


@click.command("usage")
@click.argument("keys", nargs=-1, shell_complete=snapshot_names)
@snapshotter_option
@listing
@click.pass_obj
def usage(context: Context, keys: tuple[str, ...], snapshotter: str | None, view: View) -> None:
    """Show what snapshots take up, their parents left out."""
    with context.reading() as stores:
        if keys:
            named = [stores.find_snapshot(key, snapshotter) for key in keys]
            survey = _Survey([_Found(backend, backend.stat(key)) for backend, key in named], [])
        else:
            survey = _survey(stores, snapshotter)
        rows = [
            shapes.snapshot(found.backend.name, found.info, found.backend.usage(found.info.key))
            for found in survey.found
        ]
    if view.json:
        document([*rows, *survey.faults])
        return
    _tell(survey.faults)
    if view.quiet:
        write(str(row.key) for row in rows)
        return
    short = view.shortener(info.key for _, info in survey.found)
    view.table(
        (
            Column("KEY"),
            Column("SIZE", goes=3, right=True),
            Column("INODES", goes=1, right=True),
            Column("SNAPSHOTTER", goes=2),
        ),
        [
            (short(str(row.key)), human_bytes(row.size or 0), str(row.inodes), row.snapshotter)
            for row in rows
        ],
        none="no snapshots",
    )


@click.command("rm")
@click.argument("keys", nargs=-1, required=True, shell_complete=snapshot_names)
@snapshotter_option
@action
@click.pass_obj
def remove(context: Context, keys: tuple[str, ...], snapshotter: str | None, view: View) -> None:
    """Remove snapshots that nothing stands on."""
    with context.stores() as stores:
        chosen = [stores.find_snapshot(key, snapshotter) for key in keys]
        came = stores.remove_snapshots(chosen)
    gone = chosen[: came.count]
    removed = [shapes.SnapshotName(snapshotter=backend.name, key=key) for backend, key in gone]
    done = {"removed": removed, "left": came.left}
    failed = came.failed or (FailedPrecondition(resisting(came.left)) if came.left else None)
    if failed:
        raise Incomplete(failed, done) from failed
    if view.json:
        document(done)
