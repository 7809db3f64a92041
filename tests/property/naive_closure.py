"""What a collection must keep, written from containerd's rules alone, and as simply as they are told.

Pure but for `world_of`, which reads records as they are. Nothing of `engine.gc` or `engine.metadata` is
used: labels are told apart by regular expressions, and the closure is computed by asking everybody again
until nothing is added. The rules are those of
https://github.com/containerd/containerd/blob/main/docs/garbage-collection.md; where they are silent
about what cannot be understood, it keeps.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from engine.kv.environment import Transaction
from engine.kv.schema import BLOBS, IMAGES, INGESTS, LEASE_ITEMS, LEASES, SNAPSHOTS

__all__ = [
    "Name",
    "Thing",
    "World",
    "broken_by",
    "closure",
    "grown",
    "held_alone",
    "parents_missing",
    "world_of",
]

Name = tuple[str, str, str]
"""Kind, backend, key."""


@dataclass(frozen=True)
class Thing:
    """An object; `below` is a snapshot's parent, an image's target or what an ingest is to become."""

    labels: Mapping[str, str] = field(default_factory=dict)
    below: Name | None = None
    alive: bool = False
    """A lease that somebody has, an ingest that may go on, a snapshot in use."""
    members: tuple[Name, ...] = ()


World = Mapping[Name, Thing]

_ROOT = re.compile(r"containerd\.io/gc\.root.*", re.DOTALL)
_REF = re.compile(r"containerd\.io/gc\.ref\.(content|image)(?:[./].*)?", re.DOTALL)
_REF_SNAPSHOT = re.compile(r"containerd\.io/gc\.ref\.snapshot\.([^/]*)(?:/.*)?", re.DOTALL)
_BREF = re.compile(r"containerd\.io/gc\.bref\.(content|image)(?:[./].*)?", re.DOTALL)
_BREF_SNAPSHOT = re.compile(r"containerd\.io/gc\.bref\.snapshot\.([^/]*)(?:/.*)?", re.DOTALL)
_BREF_ANY = re.compile(r"containerd\.io/gc\.bref\..*", re.DOTALL)
_COND = re.compile(r"containerd\.io/gc\.cond\.snapshot\.([^/]*)(?:/.*)?", re.DOTALL)
_USEDAT = re.compile(r"usedat([<>])((?:\d+[smh])+)")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_KINDS = {"content": "content", "image": "images"}


def _time(text: str) -> float | None:
    """Return RFC 3339 as seconds since the epoch, None for anything else."""
    if not re.fullmatch(
        r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", text, re.ASCII
    ):
        return None
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text.upper())).timestamp()
    except ValueError:
        return None


def _expired(thing: Thing, at: float) -> bool:
    when = _time(thing.labels.get("containerd.io/gc.expire", ""))
    return when is not None and when <= at


def _holds(condition: str, used_at: str | None, at: float) -> bool:
    found = _USEDAT.fullmatch(condition)
    if found is None:
        return True
    if used_at is None:
        return False
    when = _time(used_at)
    if when is None:
        return True
    length = sum(int(n) * _SECONDS[unit] for n, unit in re.findall(r"(\d+)(.)", found[2]))
    return at - when < length if found[1] == "<" else at - when > length


def _referred(key: str, value: str) -> Name | None:
    """Return what a label refers to."""
    if not value:
        return None
    if found := _REF.fullmatch(key):
        return _KINDS[found[1]], "", value
    if found := _REF_SNAPSHOT.fullmatch(key):
        return "snapshots", found[1], value
    return None


def _back(key: str, value: str) -> Name | None:
    """Return what a label says keeps its object."""
    if found := _BREF.fullmatch(key):
        return _KINDS[found[1]], "", value
    if found := _BREF_SNAPSHOT.fullmatch(key):
        return "snapshots", found[1], value
    return None


def _conditional(key: str, value: str) -> tuple[Name, list[str]] | None:
    found = _COND.fullmatch(key)
    if found is None or not value:
        return None
    conditions, bar, name = value.partition("|")
    if not bar:
        return ("snapshots", found[1], value), [""]  # says no condition: it always holds
    return ("snapshots", found[1], name or value), conditions.split(",")


def _edges(world: World, name: Name, at: float) -> Iterator[Name]:
    """Yield what an object keeps as long as it is kept."""
    thing = world[name]
    if thing.below:
        yield thing.below
    for key, value in thing.labels.items():
        if target := _referred(key, value):
            yield target
        if name[0] in {"content", "images"} and (found := _conditional(key, value)):
            target, conditions = found
            used_at = (
                world[target].labels.get("containerd.io/gc.cond.value-usedat")
                if target in world
                else None
            )
            if any(_holds(condition, used_at, at) for condition in conditions):
                yield target
    for other, held in world.items():
        if other[0] in {"content", "snapshots", "images"} and any(
            _back(key, value) == name for key, value in held.labels.items()
        ):
            yield other


def _is_root(name: Name, thing: Thing, at: float) -> bool:
    kind = name[0]
    if kind == "leases":
        return thing.alive and not _expired(thing, at)
    if kind == "images" and not _expired(thing, at):
        return True
    if kind in {"content", "snapshots"} and any(map(_ROOT.fullmatch, thing.labels)):
        return True
    unknown = (
        _BREF_ANY.fullmatch(key) and not _BREF.fullmatch(key) and not _BREF_SNAPSHOT.fullmatch(key)
        for key in thing.labels
    )
    return thing.alive or (kind in {"content", "snapshots", "images"} and any(unknown))


def closure(world: World, at: float) -> set[Name]:
    """Return what must stay."""
    whole, alone = _kept(world, at)
    return whole | alone


def _kept(world: World, at: float) -> tuple[set[Name], set[Name]]:
    """Return what stays with all that it holds, and what stays alone."""
    whole: set[Name] = set()
    alone: set[Name] = set()
    for name, thing in world.items():
        if _is_root(name, thing, at):
            whole.add(name)
            if name[0] == "leases":
                (alone if "containerd.io/gc.flat" in thing.labels else whole).update(thing.members)
    whole, alone = whole & world.keys(), alone & world.keys()
    whole = grown(world, whole, at)
    _grow(alone, lambda name: filter(None, [world[name].below]), world)
    return whole, alone


def grown(world: World, names: Iterable[Name], at: float) -> set[Name]:
    """Return some objects and all that they hold."""
    found = set(names)
    _grow(found, lambda name: _edges(world, name, at), world)
    return found


def _grow(kept: set[Name], following: Callable[[Name], Iterator[Name]], world: World) -> None:
    while True:
        added = {one for name in kept for one in following(name) if one in world} - kept
        if not added:
            return
        kept |= added


def parents_missing(world: World) -> list[Name]:
    """Return the snapshots that stand on nothing."""
    return [
        n
        for n, thing in world.items()
        if n[0] == "snapshots" and thing.below and thing.below not in world
    ]


def held_alone(world: World, at: float) -> set[Name]:
    """Return what stays without what its labels name."""
    whole, alone = _kept(world, at)
    return alone - whole


def broken_by(before: World, after: World, at: float) -> list[tuple[Name, Name]]:
    """Return who is there still and has lost what it held, but where those hold each other."""
    lost = before.keys() - after.keys()
    return [
        (name, held)
        for name in before.keys() & after.keys()
        for held in {*_edges(before, name, at), *before[name].members} & lost
        if name not in grown(before, [held], at)
    ]


def world_of(
    txn: Transaction, namespace: str, backends: list[str], me: str, at: int
) -> dict[Name, Thing]:
    """Return a namespace as its records are; `me` is the one owner that is alive."""
    found: dict[Name, Thing] = {}
    for blob in BLOBS.scan(txn, namespace):
        found["content", "", blob.digest] = Thing(blob.labels)
    for backend in backends:
        for record in SNAPSHOTS.scan(txn, backend, namespace):
            below = ("snapshots", backend, record.parent) if record.parent else None
            in_use = record.kind != "committed" and not record.lease
            found["snapshots", backend, record.key] = Thing(record.labels, below, in_use)
    for image in IMAGES.scan(txn, namespace):
        found["images", "", image.name] = Thing(image.labels, ("content", "", image.target.digest))
    for lease in LEASES.scan(txn, namespace):
        items = LEASE_ITEMS.scan(txn, namespace, lease.id)
        alive = lease.owner is None or lease.owner.id == me
        members = tuple((item.kind, item.backend, item.key) for item in items)
        found["leases", "", lease.id] = Thing(lease.labels, None, alive, members)
    for ingest in INGESTS.scan(txn, namespace):
        below = ("content", "", ingest.expected) if ingest.expected else None
        alive = ingest.expires > at or ingest.owner.id == me
        found["ingests", "", ingest.ref] = Thing({}, below, alive)
    return found
