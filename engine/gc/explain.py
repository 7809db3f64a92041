"""Says what a collection would take, and of what stays who holds it.

Sync. For the whole namespace everything is read, with what each object takes up: that needs memory for
all of it, some 200 bytes for each object. For one object its holders are looked up, and theirs.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

from engine import labels, times
from engine.errors import printable
from engine.gc.clock import look, time_of
from engine.gc.holding import holders, stands
from engine.gc.mark import reachable
from engine.gc.survey import Places, Survey, survey
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, LEASE_ITEMS, SNAPSHOTS, Blob, Image, Ingest, Lease, Snapshot
from engine.metadata import ledger, lineage
from engine.metadata.nodes import (
    CONTENT,
    IMAGE,
    LEASE,
    SNAPSHOT,
    Node,
    blob_node,
    is_root,
    snapshot_node,
)
from engine.oci.mediatypes import INDEXES

__all__ = ["Explained", "Garbage", "Hold", "Keeper", "Kept", "Link", "explain", "explain_node"]

_ROLES = {"config": "config", "l": "layer", "m": "manifest"}


@dataclass(frozen=True, slots=True)
class Keeper:
    """What keeps objects by itself, and why it does; nothing is said of an image without an end."""

    node: Node
    why: str


@dataclass(frozen=True, slots=True)
class Hold:
    """How many blobs and snapshots something keeps, the bytes that only it does, and those others do."""

    holder: Keeper
    objects: int
    alone: int
    shared: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that nothing keeps, and its bytes."""

    node: Node
    bytes: int


@dataclass(frozen=True, slots=True)
class Explained:
    """All garbage, holders first, and all that keeps anything, who alone keeps most first."""

    garbage: list[Garbage]
    held: list[Hold]


@dataclass(frozen=True, slots=True)
class Link:
    """An object on the way to another: `role` says what it is to the one above, as far as that tells."""

    node: Node
    role: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """One object, and the way to it from what keeps it, both included; none for garbage."""

    node: Node
    holder: Keeper | None
    chain: list[Link]


def explain(meta: Environment, places: Places) -> Explained:
    """Explain a whole namespace."""
    with meta.read() as txn:
        found, garbage = survey(meta, txn, places, time_of(look(txn, note=False)))
        things = dict(_all_things(txn, places))
        roots = [*_leases(txn, places, found), *_others(meta, txn, places, found)]
        counts = Counter(thing for _, kept in roots for thing in _things(kept(), things))
        held = [_told(holder, kept(), things, counts) for holder, kept in roots]
        going = list(_going(txn, places.namespace, garbage, things))
    held.sort(key=lambda one: (-one.alone, -one.shared, one.holder.node))
    return Explained(going, held)


class _Thing(NamedTuple):
    """Bytes of one object, or of several that have the same folder: the first of them stands for it."""

    node: Node
    size: int


def _things(kept: Iterable[Node], things: Mapping[Node, _Thing]) -> set[_Thing]:
    return {things[node] for node in kept if node in things}


def _going(
    txn: Transaction, namespace: str, garbage: Iterable[Node], things: Mapping[Node, _Thing]
) -> Iterator[Garbage]:
    folders = lineage.Folders()
    for node in garbage:
        record = ledger.get(txn, namespace, node) if node.kind == SNAPSHOT else None
        if isinstance(record, Snapshot) and not folders.is_last(txn, namespace, node, record):
            yield Garbage(node, 0)  # with the last that has its folder
        else:
            yield Garbage(node, things[node].size if node in things else 0)


_Reach = Callable[[], Collection[Node]]


def _told(
    holder: Keeper, kept: Iterable[Node], things: Mapping[Node, _Thing], counts: Counter[_Thing]
) -> Hold:
    nodes = [node for node in kept if node in things]
    found = _things(nodes, things)
    alone = sum(thing.size for thing in found if counts[thing] == 1)
    shared = sum(thing.size for thing in found) - alone
    objects = len(nodes)
    return Hold(holder, objects, alone, shared)


def _all_things(txn: Transaction, places: Places) -> Iterator[tuple[Node, _Thing]]:
    for blob in BLOBS.survey_each(txn, places.namespace):
        if isinstance(blob, Blob):
            yield blob_node(blob.digest), _Thing(blob_node(blob.digest), blob.size)
    for backend in SNAPSHOTS.branches(txn):
        for record in SNAPSHOTS.survey_each(txn, backend, places.namespace):
            if isinstance(record, Snapshot):
                node = snapshot_node(backend, record.key)
                first = next(ledger.sharers(txn, places.namespace, node, record), node)
                yield node, _Thing(first if record.size else node, record.size)


def _leases(txn: Transaction, places: Places, found: Survey) -> Iterator[tuple[Keeper, _Reach]]:
    """Yield the live leases, each with what finds all that it keeps."""
    for node in found.roots:
        if node.kind == LEASE:
            record = ledger.get(txn, places.namespace, node)
            assert isinstance(record, Lease)
            items = LEASE_ITEMS.survey(txn, places.namespace, node.key)[0]
            members = [node, *(Node(item.kind, item.backend, item.key) for item in items)]
            edges = found.below if labels.GC_FLAT in record.labels else found.references
            yield Keeper(node, _why(record)), _reaching(members, edges)


def _others(
    meta: Environment, txn: Transaction, places: Places, found: Survey
) -> Iterator[tuple[Keeper, _Reach]]:
    """Yield what else keeps anything: what is a root only as a member of a lease does not."""
    for node in found.roots:
        if node.kind == LEASE:
            continue
        record = ledger.get(txn, places.namespace, node)  # it could be read just now
        if node.kind == SNAPSHOT and node.backend not in places.backends:
            yield Keeper(node, f"{node.backend} cannot be used"), _reaching([node], found.references)
        elif isinstance(record, Image) and _is_over(found, record):
            continue
        elif stands(meta.owners, txn, places.namespace, node):
            yield Keeper(node, _why(record)), _reaching([node], found.references)


def _is_over(found: Survey, image: Image) -> bool:
    return found.expiry(image.labels) and not is_root(IMAGE, image.labels)


def _reaching(nodes: Iterable[Node], edges: Callable[[Node], Iterable[Node]]) -> _Reach:
    return lambda: reachable(nodes, edges)


def _why(record: object) -> str:
    """Say why an object is kept by itself, as far as its kind does not."""
    if isinstance(record, Lease | Image):
        owner = record.owner if isinstance(record, Lease) else None
        end = times.moment(record.labels.get(labels.GC_EXPIRE, ""))
        holds_for = printable(record.labels.get(labels.HELD_OWNER, ""))
        told = (
            str(owner) if owner else "",
            f"for {holds_for}" if holds_for else "",
            f"expires {times.rfc3339(end)}" if end else "",
        )
        return ", ".join(filter(None, told))
    kind = CONTENT if isinstance(record, Blob) else SNAPSHOT
    if isinstance(record, Blob | Snapshot):
        found = (f"label {key}" for key in record.labels if is_root(kind, {key: ""}))
        return next(found, "in use")
    return "being written" if isinstance(record, Ingest) else ""


def explain_node(meta: Environment, namespace: str, node: Node) -> Kept:
    """Explain one object."""
    with meta.read() as txn:
        way = _way(meta, txn, namespace, node, time_of(look(txn, note=False)))
        holder = Keeper(way[0], _why(ledger.get(txn, namespace, way[0]))) if way else None
        above = (ledger.get(txn, namespace, one) for one in way)
        roles = ("", *starmap(_role, zip(above, way[1:], strict=False)))
    return Kept(node, holder, [Link(one, role) for one, role in zip(way, roles, strict=False)])


def _role(above: object, node: Node) -> str:
    """Say what a blob is to what names it: containerd's label keys tell, and an image's media type."""
    if isinstance(above, Image):
        return "index" if above.target.media_type in INDEXES else "manifest"
    if not isinstance(above, Blob) or node.kind != CONTENT:
        return ""
    keys = (key for key, value in above.labels.items() if value == node.key)
    parts = (key.removeprefix(f"{labels.GC_REF_CONTENT}.").partition(".")[0] for key in keys)
    return next((_ROLES[part] for part in parts if part in _ROLES), "")


def _way(meta: Environment, txn: Transaction, namespace: str, node: Node, at: int | None) -> list[Node]:
    """Return a shortest way to an object from something that keeps it, both included; or nothing."""
    pending = deque([node])
    below: dict[Node, Node | None] = {node: None}
    while pending:
        one = pending.popleft()
        if stands(meta.owners, txn, namespace, one, at):
            return list(_followed(below, one))
        for above in holders(txn, namespace, one):
            if above not in below:
                below[above] = one
                pending.append(above)
    return []


def _followed(below: Mapping[Node, Node | None], node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = below[node]
