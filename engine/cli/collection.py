"""What JSON and people are told of a collection, and of who holds what stays.

Sync. A holder is told of by what people call it: an image's short name, a mount's name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from engine.cli.ending import Incomplete
from engine.cli.output import View, counted, document, human_bytes, resisting, say, write
from engine.cli.shapes import SnapshotName
from engine.cli.table import Column
from engine.errors import EngineError
from engine.explaining import CONTAINER, MOUNT
from engine.gc.collect import Collected
from engine.gc.explain import Explained, Keeper, Kept
from engine.gc.policy import Enforced
from engine.metadata.nodes import CONTENT, IMAGE, INGEST, LEASE, SNAPSHOT, Node
from engine.oci.reference import familiar
from engine.snapshots import Leftover
from engine.times import rfc3339

__all__ = ["ShownCollection", "collection", "conclude", "explained", "tell_explained", "tell_kept"]

_KINDS = {
    CONTENT: "blob",
    SNAPSHOT: "snapshot",
    IMAGE: "image",
    INGEST: "ingest",
    LEASE: "lease",
    CONTAINER: "container",
    MOUNT: "mount",
}


class ShownNode(msgspec.Struct, frozen=True, kw_only=True):
    """An object by its name."""

    kind: str
    name: str
    snapshotter: str | UnsetType = UNSET


class ShownGarbage(ShownNode, frozen=True, kw_only=True):
    """What nothing holds."""

    bytes: int


class ShownHolder(ShownNode, frozen=True, kw_only=True):
    """What holds something by itself."""

    why: str


class ShownHeld(ShownHolder, frozen=True, kw_only=True):
    """How much something holds."""

    objects: int
    alone_bytes: int
    shared_bytes: int


class ShownLink(ShownNode, frozen=True, kw_only=True):
    """An object on the way to another, and what it is to the one above."""

    role: str


class ShownKept(ShownNode, frozen=True, kw_only=True):
    """An object and what holds it, if anything."""

    holder: ShownHolder | UnsetType = UNSET
    chain: list[ShownLink]


class ShownRemoval(msgspec.Struct, frozen=True, kw_only=True):
    """An image that a policy removed."""

    names: Sequence[str]
    used: str
    why: str
    bytes: int


class ShownCollection(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection removed, or would remove."""

    dry_run: bool
    blobs: list[str]
    snapshots: list[SnapshotName]
    ingests: list[str]
    leases: list[str]
    images: list[str]
    blob_bytes: int
    snapshot_bytes: int
    left: Sequence[Leftover]
    errors: list[str]
    garbage: list[ShownGarbage] | UnsetType = UNSET
    held: list[ShownHeld] | UnsetType = UNSET
    removed: list[ShownRemoval] | UnsetType = UNSET
    disk_before: float | UnsetType = UNSET
    disk_after: float | UnsetType = UNSET


def collection(
    collected: Collected,
    *,
    dry_run: bool = False,
    explained: Explained | None = None,
    enforced: Enforced | None = None,
) -> ShownCollection:
    """Return what a collection did, who holds the rest, and what a policy removed."""
    shown = ShownCollection(
        dry_run=dry_run,
        blobs=collected.blobs,
        snapshots=[SnapshotName(snapshotter=n.backend, key=n.key) for n in collected.snapshots],
        ingests=collected.ingests,
        leases=collected.leases,
        images=collected.images,
        blob_bytes=collected.blob_bytes,
        snapshot_bytes=collected.snapshot_bytes,
        left=collected.left,
        errors=collected.errors,
    )
    if explained is not None:
        shown = msgspec.structs.replace(
            shown,
            garbage=[ShownGarbage(**_name(one.node), bytes=one.bytes) for one in explained.garbage],
            held=[
                ShownHeld(
                    **_name(one.holder.node),
                    why=one.holder.why,
                    objects=one.objects,
                    alone_bytes=one.alone,
                    shared_bytes=one.shared,
                )
                for one in explained.held
            ],
        )
    if enforced is not None:
        shown = msgspec.structs.replace(
            shown,
            removed=[
                ShownRemoval(names=one.names, used=rfc3339(one.used), why=one.why, bytes=one.bytes)
                for one in enforced.chosen
            ],
            disk_before=round(enforced.before, 2),
            disk_after=round(enforced.after, 2),
        )
    return shown


def _name(node: Node) -> dict[str, Any]:
    about = {"kind": _KINDS[node.kind], "name": node.key}
    return about | ({"snapshotter": node.backend} if node.backend else {})


def explained(kept: Kept) -> ShownKept:
    """Return what there is to say of what holds one object."""
    holder: ShownHolder | UnsetType = UNSET
    if kept.holder:
        holder = ShownHolder(**_name(kept.holder.node), why=kept.holder.why)
    chain = [ShownLink(**_name(link.node), role=link.role) for link in kept.chain]
    return ShownKept(**_name(kept.node), holder=holder, chain=chain)


# -- for people -------------------------------------------------------------------------------------


def conclude(
    view: View,
    collected: Collected,
    done: Mapping[str, Any],
    *,
    dry_run: bool = False,
    sizes: Mapping[Node, int] | None = None,
) -> None:
    """Show what a collection did; `done` says it to programs. `sizes` are told where they are known."""
    if not view.json and not view.quiet:
        _print(view, collected, dry_run=dry_run, sizes=sizes or {})
    for error in collected.errors:
        say(f"lamina: kept: {error}")
    if collected.left:
        raise Incomplete(EngineError(resisting(collected.left)), done)
    if view.json:
        document(done)


def _print(view: View, collected: Collected, *, dry_run: bool, sizes: Mapping[Node, int]) -> None:
    short = view.shortener([*collected.blobs, *(node.key for node in collected.snapshots)])

    def size(node: Node) -> str:
        return f"  {human_bytes(sizes[node])}" if node in sizes else ""

    write(f"blob      {short(one)}{size(Node(CONTENT, '', one))}" for one in collected.blobs)
    write(f"snapshot  {one.backend} {short(one.key)}{size(one)}" for one in collected.snapshots)
    write(f"ingest    {ref}" for ref in collected.ingests)
    write(f"image     {familiar(name)}" for name in collected.images)
    verb = "would remove" if dry_run else "removed"
    say(
        f"{verb} {counted(len(collected.blobs), 'blob')} ({human_bytes(collected.blob_bytes)}), "
        f"{counted(len(collected.snapshots), 'snapshot')} ({human_bytes(collected.snapshot_bytes)}), "
        f"{counted(len(collected.ingests), 'ingest')}"
    )


def tell_explained(view: View, explained: Explained) -> None:
    """Show who holds what stays."""
    short = view.shortener([one.holder.node.key for one in explained.held])
    columns = ("KEPT BY", "NAME", "OBJECTS", "ALONE", "SHARED", "WHY")
    view.table(
        tuple(map(Column, columns)),
        [
            (
                _KINDS[one.holder.node.kind],
                short(_called(one.holder.node)),
                str(one.objects),
                human_bytes(one.alone),
                human_bytes(one.shared),
                one.holder.why or "-",
            )
            for one in explained.held
        ],
        none="nothing is kept",
    )


def _called(node: Node) -> str:
    return familiar(node.key) if node.kind == IMAGE else node.key


def tell_kept(view: View, found: Sequence[Kept]) -> None:
    """Show what holds objects, a line for each."""
    short = view.shortener([node.key for kept in found for node in _on_the_way(kept)])

    def told(node: Node, role: str = "") -> str:
        backend = f"{node.backend} " if node.kind == SNAPSHOT else ""
        return f"{role or _KINDS[node.kind]} {backend}{short(_called(node))}"

    for kept in found:
        if kept.holder is None:
            write([f"{told(kept.node)}: held by nothing, the next `lamina gc` removes it"])
            continue
        way = [
            _with_reason(kept.holder, told(kept.holder.node)),
            *(told(link.node, link.role) for link in kept.chain[1:]),
        ]
        if len(way) == 1:
            way[0] = _with_reason(kept.holder, "itself")
        write([f"{told(kept.node)}: kept by {' -> '.join(way)}"])


def _on_the_way(kept: Kept) -> list[Node]:
    return [kept.node, *(link.node for link in kept.chain)]


def _with_reason(holder: Keeper, name: str) -> str:
    return f"{name} ({holder.why})" if holder.why else name
