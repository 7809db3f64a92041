"""Everything of a namespace as one transaction sees it: what is kept, by what, and what is garbage.

Sync. Roots are images that have not expired, live leases, ingests that may go on, snapshots that
someone may be using (active ones and views that no lease made), and what carries `gc.root`. Edges are
what records mention (`engine.metadata.nodes`); of the members of a flat lease only a snapshot's parent
and an image's target.

Where a record cannot be read nobody knows what it holds: then no blob, snapshot or image is garbage.
It takes some 3 µs for each record, in which others write as they like. A blob goes by its digest alone
here: there are millions of blobs, and of what names them, and a tuple for each costs more than all else.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from engine import labels, times
from engine.gc.mark import by_level, children_first, holders_first, reachable
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import (
    BLOBS,
    IMAGES,
    INGESTS,
    LEASE_ITEMS,
    LEASES,
    SNAPSHOTS,
    Blob,
    Ingest,
    Lease,
    Snapshot,
)
from engine.kv.table import Damaged, Record, Table
from engine.metadata import ledger
from engine.metadata.leases import is_live
from engine.metadata.nodes import (
    BACK,
    CONDITION,
    CONTENT,
    LABEL,
    SNAPSHOT,
    Mention,
    Node,
    Object,
    blob_node,
    is_met,
    is_root,
    mentions,
    names_content,
    node_of,
    snapshot_node,
)
from engine.processes import Owners
from engine.snapshots import Kind

__all__ = ["Places", "Survey", "ingest_lives", "survey"]

R = TypeVar("R", bound=Record)

Name = str | Node
"""A blob's digest, or another node."""

_RELEASE_EVERY = 1 << 14  # records read between two calls that give their memory back


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where to look: a namespace, and the backends that can be used.

    The snapshots of any other are kept: of those that are broken here, or were first used just now.
    `vanished` are the snapshots, by backend and key, of mounts that are gone: nobody holds those.
    """

    namespace: str
    backends: Collection[str]
    vanished: Collection[tuple[str, str]] = ()


@dataclass(slots=True)
class Survey:
    """What holds what; `roots` says of each whether it is held alone, without what its labels name."""

    at: int | None
    """The time; without, as where the clock is doubted, nothing expires, and every condition holds."""
    roots: dict[Node, bool] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    expires: int | None = None
    """When the next lease or image does."""
    alone: set[Node] = field(default_factory=set)
    """What is kept without what its labels name."""
    _made_of: dict[Name, Name] = field(default_factory=dict)
    _refer: dict[Name, list[Name]] = field(default_factory=dict)

    def references(self, node: Node) -> Iterator[Node]:
        """Yield what a node holds."""
        return map(_node, self._references(_name(node)))

    def below(self, node: Node) -> Iterator[Node]:
        """Yield what a node holds as a member of a flat lease."""
        return map(_node, self._below(_name(node)))

    def _references(self, name: Name) -> Sequence[Name]:
        found = self._refer.get(name, ())
        below = self._made_of.get(name)
        return found if below is None else (below, *found)

    def _below(self, name: Name) -> Sequence[Name]:
        return (self._made_of[name],) if name in self._made_of else ()

    def garbage(self, everything: Iterable[Name]) -> list[Node]:
        """Return what is not kept of all that there is, as it may go; note what is kept alone."""
        whole = reachable(self._roots(alone=False), self._references)
        alone = reachable(self._roots(alone=True), self._below) - whole
        self.alone = set(map(_node, alone))
        return self._in_order([one for one in everything if one not in whole and one not in alone])

    def _roots(self, *, alone: bool) -> Iterator[Name]:
        return (_name(node) for node, is_alone in self.roots.items() if is_alone == alone)

    def _in_order(self, garbage: list[Name]) -> list[Node]:
        """Return nodes with holders before what they hold; children come first even in a circle."""
        children: defaultdict[Name, list[Name]] = defaultdict(list)
        for name in garbage:
            if isinstance(name, Node) and name.kind == SNAPSHOT and name in self._made_of:
                children[self._made_of[name]].append(name)
        order = holders_first(garbage, self._references)
        order = by_level(order, self._references, lambda name: name if isinstance(name, str) else "")
        return list(map(_node, children_first(order, lambda name: children.get(name, ()))))

    def forget(self) -> None:
        """Forget what holds what, which takes memory."""
        self._made_of.clear()
        self._refer.clear()

    def note(self, node: Node, mention: Mention) -> None:
        """Note an edge."""
        holder, held = _name(node), _name(mention.node)
        if mention.how == BACK:
            self._refer.setdefault(held, []).append(holder)
        elif mention.how in {LABEL, CONDITION}:
            self._refer.setdefault(holder, []).append(held)
        else:
            self._made_of[holder] = held

    def refer(self, digest: str, blobs: list[str]) -> None:
        """Note what blobs a blob's labels name."""
        self._refer.setdefault(digest, []).extend(blobs)

    def root(self, node: Node, *, alone: bool = False) -> None:
        """Note a root; held whole by one, it is held whole."""
        self.roots[node] = alone and self.roots.get(node, True)

    def expiry(self, about: labels.Labels) -> bool:
        """Say whether what has these labels has expired, and note when it will."""
        when = times.moment(about.get(labels.GC_EXPIRE, "")) if about else None
        if when is None or (self.at is not None and when <= self.at):
            return when is not None
        self.expires = min(when, self.expires or when)
        return False


def _name(node: Node) -> Name:
    return node.key if node.kind == CONTENT else node


def _node(name: Name) -> Node:
    return name if isinstance(name, Node) else blob_node(name)


def ingest_lives(owners: Owners, ingest: Ingest, at: int | None) -> bool:
    """Say whether an ingest may still go on, whatever lease it has; without a time, it may."""
    return at is None or ingest.expires > at or owners.is_alive(ingest.owner.id)


def survey(
    meta: Environment,
    txn: Transaction,
    places: Places,
    at: int | None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Survey, list[Node]]:
    """Return what holds what at the time `at`, and the garbage, holders first.

    `beat` is called many times a second while records are read.
    """
    found = Survey(at)
    reader = _Reader(meta, txn, places, found, beat)
    reader.read()
    if found.damaged:
        return found, list(reader.dead())
    return found, found.garbage(reader.everything)


class _Reader:
    def __init__(
        self,
        meta: Environment,
        txn: Transaction,
        places: Places,
        found: Survey,
        beat: Callable[[], None],
    ) -> None:
        self._meta = meta
        self._beat = beat
        self._txn = txn
        self._at = places
        self._found = found
        self.everything: list[Name] = []
        self._conditions: list[tuple[Node, Node, labels.Labels]] = []
        self._back: list[tuple[Node, Mention]] = []
        self._used: dict[Node, str] = {}
        self._count = 0

    def _each(self, table: Table[R], *prefix: str) -> Iterator[R]:
        for record in table.survey_each(self._txn, *prefix):
            self._count += 1
            if self._count % _RELEASE_EVERY == 0:
                self._meta.release_pages()
                self._beat()
            if isinstance(record, Damaged):
                self._found.damaged.append(f"{table.name[:-1]} {record.name}: {record.error}")
            else:
                yield record

    def _snapshots(self) -> Iterator[tuple[str, Snapshot]]:
        for backend in SNAPSHOTS.branches(self._txn):
            for record in self._each(SNAPSHOTS, backend, self._at.namespace):
                yield backend, record

    def read(self) -> None:
        """Read all records once for what they hold."""
        namespace, found = self._at.namespace, self._found
        owners, at = self._meta.owners, found.at
        everything = self.everything
        for lease in list(self._each(LEASES, namespace)):
            everything.append(node_of(lease))
            self._lease(lease)
        for image in self._each(IMAGES, namespace):
            node = node_of(image)
            everything.append(node)
            self._note(node, image, image.labels)
            if not found.expiry(image.labels):
                found.root(node)
        for ingest in self._each(INGESTS, namespace):
            node = node_of(ingest)
            everything.append(node)
            self._note(node, ingest, {})
            if ingest_lives(owners, ingest, at):
                found.root(node)
        for blob in self._each(BLOBS, namespace):
            everything.append(blob.digest)
            if blob.labels:  # most have none
                self._blob(blob)
        for backend, snapshot in self._snapshots():
            self._snapshot(backend, snapshot)
        self._settle()

    def _blob(self, blob: Blob) -> None:
        about = {key: value for key, value in blob.labels.items() if key.startswith(labels.GC)}
        if all(map(names_content, about)):  # of a manifest: one for each layer
            self._found.refer(blob.digest, list(filter(None, about.values())))
        else:
            self._note(blob_node(blob.digest), blob, about)

    def _settle(self) -> None:
        """Note the edges that depend on what else there is."""
        at = self._found.at
        for node, target, about in self._conditions:
            if at is None or is_met(about, target, self._used.get(target), at):
                self._found.note(node, Mention(LABEL, target))
        for node, mention in self._back:  # what never was keeps nothing
            if ledger.exists(self._txn, self._at.namespace, mention.node):
                self._found.note(node, mention)

    def _lease(self, lease: Lease) -> None:
        expired = self._found.expiry(lease.labels)
        if (expired and not lease.outlasts) or not is_live(self._meta.owners, lease, self._found.at):
            return
        node = node_of(lease)
        self._found.root(node)
        self._note(node, lease, lease.labels)
        is_flat = labels.GC_FLAT in lease.labels
        for item in list(self._each(LEASE_ITEMS, self._at.namespace, lease.id)):
            self._found.root(Node(item.kind, item.backend, item.key), alone=is_flat)

    def _snapshot(self, backend: str, record: Snapshot) -> None:
        node = snapshot_node(backend, record.key)
        self.everything.append(node)
        self._note(node, record, record.labels)
        if labels.GC_USED_AT in record.labels:
            self._used[node] = record.labels[labels.GC_USED_AT]
        in_use = record.kind != Kind.COMMITTED and not record.lease
        is_vanished = (backend, record.key) in self._at.vanished
        if backend not in self._at.backends or (in_use and not is_vanished):
            self._found.root(node)

    def _note(self, node: Node, record: Object, about: labels.Labels) -> None:
        if about and is_root(node.kind, about):
            self._found.root(node)
        for mention in mentions(node, record):
            if mention.how == CONDITION:
                self._conditions.append((node, mention.node, about))
            elif mention.how == BACK:
                self._back.append((node, mention))
            else:
                self._found.note(node, mention)

    def dead(self) -> Iterator[Node]:
        """Yield the leases and ingests that nobody works with."""
        namespace, roots = self._at.namespace, self._found.roots
        leases, _ = LEASES.survey(self._txn, namespace)
        ingests, _ = INGESTS.survey(self._txn, namespace)
        nodes = (*(map(node_of, leases)), *(map(node_of, ingests)))
        return (node for node in nodes if node not in roots)
