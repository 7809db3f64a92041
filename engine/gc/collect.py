"""Finds and drops garbage: records in one transaction, bytes and folders afterwards.

Sync. Roots are images, snapshots that someone may be using (active ones and views that no lease made),
the members of live leases, and what carries `gc.root`. Edges are containerd's labels, and a snapshot's
parent. Marking and dropping share one write transaction, so that nothing can be created, found or
labelled in between. The transaction takes as long as there are records (10 µs for each, a second for
100,000), whatever they stand for: `ContentStore.cleanup` and `Snapshotter.cleanup` delete bytes later.

Where a record cannot be read nobody knows what it holds: then no blob and no snapshot goes.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeVar

import msgspec

from engine import labels
from engine.content import discard
from engine.errors import DataLoss, FailedPrecondition, NotFound
from engine.failpoints import hit
from engine.gc.mark import reachable
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import (
    BLOBS,
    CHILDREN,
    IMAGES,
    INGESTS,
    LEASE_ITEMS,
    LEASES,
    SNAPSHOTS,
    Blob,
    Snapshot,
    now,
)
from engine.kv.table import Record, Table
from engine.metadata import leases, lineage
from engine.oci.reference import familiar
from engine.snapshots import Kind, Leftover

R = TypeVar("R", bound=Record)

__all__ = ["Collected", "Dropped", "Node", "collect", "give_up", "remove_blob"]


class Node(NamedTuple):
    """A blob (`backend` empty) or a snapshot."""

    kind: str
    backend: str
    key: str


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection dropped, or would drop; sizes in bytes."""

    blobs: list[str]
    snapshots: list[Node]
    ingests: list[str]
    leases: list[str]
    blob_bytes: int
    snapshot_bytes: int
    left: list[Leftover] = []
    """Files that could not be deleted yet."""
    errors: list[str] = []
    """What was kept because it, or what holds it, cannot be read or used."""


class Dropped(NamedTuple):
    """What was dropped, by the numbers of its files and bytes: snapshots by backend, and blobs."""

    snapshots: dict[str, list[int]]
    blobs: list[int]


def _blob_node(digest: str) -> Node:
    return Node(leases.CONTENT, "", digest)


def _snapshot_node(backend: str, key: str) -> Node:
    return Node(leases.SNAPSHOT, backend, key)


class _Graph:
    """Everything in one namespace as one transaction sees it; snapshots of `kept` backends stay."""

    def __init__(
        self,
        meta: Environment,
        txn: Transaction,
        namespace: str,
        backends: Collection[str],
        kept: Collection[str],
        vanished: Collection[tuple[str, str]] = (),
    ) -> None:
        self._txn = txn
        self._kept = kept
        self._vanished = vanished
        self.damaged: list[str] = []
        self.images = self._readable(IMAGES, namespace)
        self.blobs: dict[str, Blob] = {b.digest: b for b in self._readable(BLOBS, namespace)}
        self.snapshots: dict[tuple[str, str], Snapshot] = {
            (backend, record.key): record
            for backend in (*backends, *kept)
            for record in self._readable(SNAPSHOTS, backend, namespace)
        }
        at = now()
        all_leases = self._readable(LEASES, namespace)
        self.live = {lease.id for lease in all_leases if leases.is_live(meta.owners, lease, at)}
        self.dead = [lease.id for lease in all_leases if lease.id not in self.live]
        self.leased = [
            Node(item.kind, item.backend, item.key)
            for lease in self.live
            for item in self._readable(LEASE_ITEMS, namespace, lease)
        ]
        self.ingests = self._readable(INGESTS, namespace)

    def _readable(self, table: Table[R], *prefix: str) -> list[R]:
        found, damaged = table.survey(self._txn, *prefix)
        self.damaged += [f"{table.name[:-1]} {record.name}: {record.error}" for record in damaged]
        return found

    def roots(self) -> Iterator[Node]:
        for image in self.images:
            yield _blob_node(image.target.digest)
        yield from self.leased
        for digest, blob in self.blobs.items():
            if _is_root(blob.labels):
                yield _blob_node(digest)
        for (backend, key), record in self.snapshots.items():
            in_use = record.kind != Kind.COMMITTED and not record.lease
            in_use = in_use and (backend, key) not in self._vanished
            if in_use or backend in self._kept or _is_root(record.labels):
                yield _snapshot_node(backend, key)

    def references(self, node: Node) -> Iterator[Node]:
        if node.kind == leases.CONTENT:
            blob = self.blobs.get(node.key)
            about = blob.labels if blob else {}
        else:
            record = self.snapshots.get((node.backend, node.key))
            about = record.labels if record else {}
            if record and record.parent:
                yield _snapshot_node(node.backend, record.parent)
        for digest in labels.content_refs(about):
            yield _blob_node(digest)
        for backend, key in labels.snapshot_refs(about):
            yield _snapshot_node(backend, key)

    def garbage(self) -> Collected:
        kept = reachable(self.roots(), self.references)
        blobs = [digest for digest in self.blobs if _blob_node(digest) not in kept]
        snapshots = [key for key in self.snapshots if _snapshot_node(*key) not in kept]
        if self.damaged:
            blobs, snapshots = [], []
        return Collected(
            blobs=sorted(blobs),
            snapshots=[_snapshot_node(*key) for key in self._children_first(snapshots)],
            ingests=[i.ref for i in self.ingests if i.lease not in self.live],
            leases=self.dead,
            blob_bytes=sum(self.blobs[digest].size for digest in blobs),
            snapshot_bytes=sum(self.snapshots[key].size for key in snapshots),
            errors=self.damaged,
        )

    def _children_first(self, keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
        depths: dict[tuple[str, str], int] = {}

        def depth(key: tuple[str, str]) -> int:
            chain = []
            below = key
            while below in self.snapshots and below not in depths:
                depths[below] = 0  # so that a damaged store with a circle of parents ends here
                chain.append(below)
                below = (below[0], self.snapshots[below].parent)
            lowest = depths.get(below, -1) + 1
            depths.update((each, lowest + above) for above, each in enumerate(reversed(chain)))
            return depths[key]

        return sorted(keys, key=lambda key: (-depth(key), key))


def _is_root(about: labels.Labels) -> bool:
    return any(key.startswith(labels.GC_ROOT) for key in about)


def collect(
    meta: Environment,
    namespace: str,
    backends: Collection[str],
    *,
    kept: Collection[str] = (),
    dry_run: bool = False,
    vanished: Collection[tuple[str, str]] = (),
) -> Collected:
    """Drop the records of all garbage of a namespace and return what that was.

    With `dry_run` only return it. `backends` are all that may have snapshots here; those that cannot
    be used are in `kept`, and all their snapshots stay. `vanished` are the snapshots, by backend and
    key, of mounts that are gone: a dry run counts them as held by nobody.
    """
    if dry_run:
        with meta.read() as txn:
            return _Graph(meta, txn, namespace, backends, kept, vanished).garbage()
    with meta.write() as txn:
        graph = _Graph(meta, txn, namespace, backends, kept)
        garbage = graph.garbage()
        _drop(txn, namespace, graph, garbage)
    hit("gc.swept")
    return garbage


def give_up(
    meta: Environment,
    namespace: str,
    backends: Collection[str],
    lease: str,
    *,
    kept: Collection[str] = (),
) -> Dropped:
    """End a lease whose work failed, drop what it made and nothing else holds, and return that.

    Other garbage stays for a collection: failing is no reason to take what someone may still want.
    """
    with meta.write() as txn:
        items = LEASE_ITEMS.scan(txn, namespace, lease)
        mine = {Node(item.kind, item.backend, item.key) for item in items}
        leases.drop(txn, namespace, lease)
        graph = _Graph(meta, txn, namespace, backends, kept)
        garbage = graph.garbage()
        ours = msgspec.structs.replace(
            garbage,
            blobs=[digest for digest in garbage.blobs if _blob_node(digest) in mine],
            snapshots=[node for node in garbage.snapshots if node in mine],
            ingests=[ingest.ref for ingest in graph.ingests if ingest.lease == lease],
            leases=[],
        )
        return _drop(txn, namespace, graph, ours)


def _drop(txn: Transaction, namespace: str, graph: _Graph, garbage: Collected) -> Dropped:
    dropped = Dropped({}, [])
    for node in garbage.snapshots:
        if not CHILDREN.any(txn, node.backend, namespace, node.key):
            record = graph.snapshots[node.backend, node.key]
            lineage.drop(txn, node.backend, namespace, record)
            dropped.snapshots.setdefault(node.backend, []).append(record.id)
    numbers = [discard.drop_blob(txn, namespace, digest) for digest in garbage.blobs]
    numbers += [discard.drop_ingest(txn, namespace, ref) for ref in garbage.ingests]
    dropped.blobs.extend(number for number in numbers if number is not None)
    for lease in garbage.leases:
        leases.drop(txn, namespace, lease)
    return dropped


def remove_blob(
    meta: Environment,
    namespace: str,
    backends: Collection[str],
    digest: str,
    *,
    kept: Collection[str] = (),
) -> int:
    """Drop one blob that nothing holds; return the number of its bytes.

    Raises NotFound, and FailedPrecondition that names a holder.
    """
    node = _blob_node(digest)
    with meta.write() as txn:
        graph = _Graph(meta, txn, namespace, backends, kept)
        if digest not in graph.blobs:
            raise NotFound(f"no blob {digest}")
        for image in graph.images:
            if node in reachable([_blob_node(image.target.digest)], graph.references):
                raise FailedPrecondition(
                    f"blob {digest} belongs to image {familiar(image.name)}; remove the image, "
                    "then run `lamina gc`"
                )
        if graph.damaged:
            raise DataLoss(f"blob {digest} may be held by what cannot be read: {graph.damaged[0]}")
        if node in reachable(graph.roots(), graph.references):
            raise FailedPrecondition(f"blob {digest} is held by work under way; try again later")
        discard.drop_blob(txn, namespace, digest)
        return graph.blobs[digest].number
