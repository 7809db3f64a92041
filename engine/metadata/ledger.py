"""The one room that writes objects: blobs, ingests, images, leases and what they hold, snapshots.

Sync. Every change to an object's record goes through `put`, `drop`, `pin` or `unpin`, which keep two
more things in the same transaction:

- who mentions what, so that the holders of one object are found without reading all others;
- while a namespace is being collected, what was touched since its mark began: made, changed, pinned or
  newly mentioned. What is touched is not collected (a write barrier): what a mark found unreachable can
  only become reachable by being touched, or by being mentioned by something that is.

Bytes and folders are the callers'. What a record is, and what may be done to it, too.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from engine.errors import DataLoss, FailedPrecondition
from engine.kv.environment import Transaction
from engine.kv.schema import (
    BLOBS,
    COUNTERS,
    HOLDINGS,
    IMAGES,
    INGESTS,
    LAYERS,
    LEASE_ITEMS,
    LEASES,
    MARKS,
    MENTIONS,
    SNAPSHOTS,
    TOUCHED,
    Blob,
    Holding,
    LayerFolder,
    LeaseItem,
    Mentioned,
    Snapshot,
    Touched,
)
from engine.kv.table import Damaged, Table
from engine.metadata.events import Change
from engine.metadata.nodes import (
    BACK,
    CONTENT,
    IMAGE,
    INGEST,
    LEASE,
    MEMBER,
    PARENT,
    SNAPSHOT,
    Mention,
    Node,
    Object,
    blob_node,
    mentions,
    node_of,
    snapshot_node,
    token,
)

__all__ = [
    "HOME",
    "check_lease",
    "deletions",
    "drop",
    "ended",
    "exists",
    "get",
    "has_children",
    "has_folder",
    "held",
    "holdings",
    "is_elsewhere",
    "let_go",
    "members",
    "mentioners",
    "mentioning",
    "note_deletion",
    "pin",
    "put",
    "put_snapshot",
    "rebuild",
    "sharers",
    "table_of",
    "unpin",
    "with_layer",
]

HOME = "default"
"""The namespace whose blobs are looked up where those of others are noted: most stores have no other."""

_DELETIONS = "deletions of "
_LET_GO = 500  # members removed in one transaction: 5 ms

_TABLES: dict[str, Table[Any]] = {
    CONTENT: BLOBS,
    IMAGE: IMAGES,
    INGEST: INGESTS,
    LEASE: LEASES,
    SNAPSHOT: SNAPSHOTS,
}


def table_of(kind: str) -> Table[Any]:
    """Return the table that has the records of a kind of node."""
    return _TABLES[kind]


def _key(namespace: str, node: Node) -> tuple[str, ...]:
    return (node.backend, namespace, node.key) if node.kind == SNAPSHOT else (namespace, node.key)


def get(txn: Transaction, namespace: str, node: Node) -> Object | None:
    """Return an object's record, None if there is none. Raises DataLoss if it cannot be read."""
    found: Object | None = _TABLES[node.kind].get(txn, *_key(namespace, node))
    return found


def exists(txn: Transaction, namespace: str, node: Node) -> bool:
    """Say whether an object has a record, readable or not."""
    return _TABLES[node.kind].any(txn, *_key(namespace, node))


# -- changes ----------------------------------------------------------------------------------------


def put(txn: Transaction, namespace: str, record: Object) -> None:
    """Write an object's record, over an earlier one; a snapshot's with `put_snapshot`."""
    assert not isinstance(record, Snapshot)
    _put(txn, namespace, node_of(record), record)
    if isinstance(record, Blob):
        _note_bytes(txn, namespace, record)


def put_snapshot(txn: Transaction, backend: str, namespace: str, record: Snapshot) -> None:
    """Write a snapshot's record, over an earlier one."""
    _put(txn, namespace, snapshot_node(backend, record.key), record)


def _put(txn: Transaction, namespace: str, node: Node, record: Object) -> None:
    old = _readable(txn, namespace, node)
    before = _mentioned(node, old)
    after = set(mentions(node, record))
    _unlink(txn, namespace, node, before - after)
    for mention in after - before:
        _link(txn, namespace, node, mention)
    _note_layer(txn, namespace, node, old, record)
    _TABLES[node.kind].put(txn, record, *_key(namespace, node))
    _note(txn, namespace, node, old, record)
    new = [mention.node for mention in after - before if mention.how != BACK]
    _touch(txn, namespace, node, *new)


def drop(txn: Transaction, namespace: str, node: Node) -> Object | None:
    """Remove an object's record and what it mentions; return it, None if there was none to read.

    A lease's members are let go, hundreds at least, and hold nothing any more: `let_go` takes the
    others. All goes whether or not it can be read: what is mentioned by what
    cannot be stays noted, until `lamina fsck --repair`.
    """
    record = _readable(txn, namespace, node)
    _unlink(txn, namespace, node, _mentioned(node, record))
    if node.kind == LEASE:
        let_go(txn, namespace, node.key)
    if node.kind == CONTENT and namespace != HOME:
        HOLDINGS.delete(txn, node.key, namespace)
    _note_layer(txn, namespace, node, record, None)
    if _TABLES[node.kind].delete(txn, *_key(namespace, node)):
        _note(txn, namespace, node, record, None)
    return record


def pin(txn: Transaction, namespace: str, lease: str, node: Node, *, made: bool = False) -> None:
    """Add an object to a lease; an empty lease ID means that the caller needs no pin.

    `made` says that the lease's work made it, and may take it back. FailedPrecondition if the lease
    has ended.
    """
    if not lease:
        return
    check_lease(txn, namespace, lease)
    old = LEASE_ITEMS.get(txn, namespace, lease, *node)
    kind, backend, key = node
    item = LeaseItem(kind=kind, backend=backend, key=key, made=made or (old is not None and old.made))
    LEASE_ITEMS.put(txn, item, namespace, lease, *node)
    _link(txn, namespace, Node(LEASE, "", lease), Mention(MEMBER, node))
    _touch(txn, namespace, node)


def let_go(txn: Transaction, namespace: str, lease: str) -> bool:
    """Remove some of what a lease held that ends or has ended; say whether that was all."""
    node = Node(LEASE, "", lease)
    some = islice(LEASE_ITEMS.survey_each(txn, namespace, lease), _LET_GO)
    readable = [item for item in some if isinstance(item, LeaseItem)]
    held = [Mention(MEMBER, Node(item.kind, item.backend, item.key)) for item in readable]
    _unlink(txn, namespace, node, held)
    return LEASE_ITEMS.clear(txn, namespace, lease, most=_LET_GO)


def ended(txn: Transaction, namespace: str, leases: Collection[str] = ()) -> list[str]:
    """Return which leases, of some or of all, have ended and still have members."""
    found = [
        lease
        for lease in leases or LEASE_ITEMS.branches(txn, namespace)
        if not LEASES.any(txn, namespace, lease)
    ]
    return [lease for lease in found if LEASE_ITEMS.any(txn, namespace, lease)]


def unpin(txn: Transaction, namespace: str, lease: str, node: Node) -> bool:
    """Take an object out of a lease; say whether it was in it."""
    _unlink(txn, namespace, Node(LEASE, "", lease), [Mention(MEMBER, node)])
    return LEASE_ITEMS.delete(txn, namespace, lease, *node)


def note_deletion(txn: Transaction, namespace: str) -> None:
    """Count that a user deleted something: a collection may find more."""
    COUNTERS.set(txn, _DELETIONS + namespace, deletions(txn, namespace) + 1)


def deletions(txn: Transaction, namespace: str) -> int:
    """Return how often users have deleted something, since this could be read."""
    try:
        return COUNTERS.last(txn, _DELETIONS + namespace)
    except DataLoss:
        return 0


def check_lease(txn: Transaction, namespace: str, lease: str) -> None:
    """Raise FailedPrecondition if a lease has ended."""
    if lease and LEASES.get(txn, namespace, lease) is None:
        raise FailedPrecondition(f"lease {lease} has ended; start the operation again")


def _note(
    txn: Transaction, namespace: str, node: Node, before: Object | None, after: Object | None
) -> None:
    """Have whoever listens told, once it is durable."""
    if txn.noted is not None:
        txn.noted.append(Change(namespace, node, before, after))


def _readable(txn: Transaction, namespace: str, node: Node) -> Object | None:
    """Return an object's record if it can be read. What one mentions that cannot stays noted."""
    try:
        return get(txn, namespace, node)
    except DataLoss:
        return None


def _mentioned(node: Node, record: Object | None) -> set[Mention]:
    return set(mentions(node, record)) if record else set()


def _link(txn: Transaction, namespace: str, node: Node, mention: Mention) -> None:
    kind, backend, key = node
    record = Mentioned(how=mention.how, kind=kind, backend=backend, key=key)
    MENTIONS.put(txn, record, namespace, token(mention.node), mention.how, token(node))


def _unlink(txn: Transaction, namespace: str, node: Node, mentioned: Iterable[Mention]) -> None:
    mine = token(node)
    for mention in mentioned:
        MENTIONS.delete(txn, namespace, token(mention.node), mention.how, mine)


def _note_layer(
    txn: Transaction, namespace: str, node: Node, old: Object | None, new: Object | None
) -> None:
    """Note in whose folder the layer of a snapshot is, instead of what was noted of it before."""
    if isinstance(old, Snapshot) and old.diff_id:
        LAYERS.delete(txn, *_layer(namespace, node, old), token(node))
    if isinstance(new, Snapshot) and new.diff_id:
        found = LayerFolder(key=new.key, number=new.layer or new.id)
        LAYERS.put(txn, found, *_layer(namespace, node, new), token(node))


def _layer(namespace: str, node: Node, record: Snapshot) -> tuple[str, ...]:
    return node.backend, namespace, record.diff_id, str(record.layer or record.id)


def _note_bytes(txn: Transaction, namespace: str, blob: Blob) -> None:
    if namespace != HOME:
        holding = Holding(namespace=namespace, number=blob.number)
        HOLDINGS.put(txn, holding, blob.digest, namespace)


def _touch(txn: Transaction, namespace: str, *nodes: Node) -> None:
    if MARKS.any(txn, namespace):
        for node in nodes:
            kind, backend, key = node
            TOUCHED.put(txn, Touched(kind=kind, backend=backend, key=key), namespace, token(node))


def rebuild(txn: Transaction) -> None:
    """Write anew who mentions what and has which bytes, from all records that can be read.

    In one transaction, however many there are: seconds for each 100,000, in which nobody can write.
    An older format is brought up so by whoever has the root for itself.
    """
    MENTIONS.clear(txn)
    HOLDINGS.clear(txn)
    LAYERS.clear(txn)
    for kind, table in _TABLES.items():
        for names, record in table.entries(txn):
            if isinstance(record, Damaged):
                continue
            backend, namespace = names[:2] if kind == SNAPSHOT else ("", names[0])
            node = snapshot_node(backend, record.key) if kind == SNAPSHOT else node_of(record)
            for mention in mentions(node, record):
                _link(txn, namespace, node, mention)
            if isinstance(record, Blob):
                _note_bytes(txn, namespace, record)
            _note_layer(txn, namespace, node, None, record)
    for (namespace, lease, *_), item in LEASE_ITEMS.entries(txn):
        if isinstance(item, LeaseItem):
            member = Node(item.kind, item.backend, item.key)
            _link(txn, namespace, Node(LEASE, "", lease), Mention(MEMBER, member))


# -- questions --------------------------------------------------------------------------------------


def mentioners(txn: Transaction, namespace: str, node: Node, how: str = "") -> Iterator[Mention]:
    """Yield who mentions an object, and how; in no order, and only as long as `txn` lasts."""
    prefix = (namespace, token(node), how) if how else (namespace, token(node))
    for record in MENTIONS.each(txn, *prefix):
        yield Mention(record.how, Node(record.kind, record.backend, record.key))


def mentioning(txn: Transaction, namespace: str, node: Node) -> set[Mention]:
    """Return what an object mentions, the members of a lease among it; nothing if it is not there.

    Raises DataLoss where that cannot be read.
    """
    record = get(txn, namespace, node)
    if record is None:
        return set()
    found = set(mentions(node, record))
    if node.kind == LEASE:
        found.update(Mention(MEMBER, member) for member in members(txn, namespace, node.key))
    return found


def held(txn: Transaction, namespace: str, node: Node) -> list[Node]:
    """Return what an object holds, as far as that can be read."""
    try:
        found = [one.node for one in mentioning(txn, namespace, node) if one.how != BACK]
    except DataLoss:
        found = []
    return [*found, *(one.node for one in mentioners(txn, namespace, node, BACK))]


def members(txn: Transaction, namespace: str, lease: str, *, made: bool = False) -> list[Node]:
    """Return what a lease keeps, or what of it the lease's work made, as far as that can be read."""
    return [
        Node(item.kind, item.backend, item.key)
        for item in LEASE_ITEMS.survey(txn, namespace, lease)[0]
        if item.made or not made
    ]


def has_children(txn: Transaction, backend: str, namespace: str, key: str) -> bool:
    """Say whether snapshots stand on this one."""
    return MENTIONS.any(txn, namespace, token(snapshot_node(backend, key)), PARENT)


def holdings(txn: Transaction, digest: str) -> list[Holding]:
    """Return which namespaces have a blob, and under what number its bytes are."""
    found = HOLDINGS.scan(txn, digest)
    home = _readable(txn, HOME, blob_node(digest))
    if isinstance(home, Blob):
        found.append(Holding(namespace=HOME, number=home.number))
    return found


def with_layer(txn: Transaction, backend: str, namespace: str, diff_id: str) -> Iterator[LayerFolder]:
    """Yield which snapshots have or keep a folder with a layer, while `txn` lasts."""
    for found in LAYERS.survey_each(txn, backend, namespace, diff_id):
        if isinstance(found, LayerFolder):
            yield found


def has_folder(txn: Transaction, backend: str, namespace: str, diff_id: str, number: int) -> bool:
    """Say whether a snapshot has or keeps the folder `number` with a layer."""
    return bool(diff_id) and LAYERS.any(txn, backend, namespace, diff_id, str(number))


def sharers(txn: Transaction, namespace: str, node: Node, record: Snapshot) -> Iterator[Node]:
    """Yield which snapshots have or keep the folder of this one, itself among them if it is there."""
    if not record.diff_id:
        yield node
        return
    for found in LAYERS.survey_each(txn, *_layer(namespace, node, record)):
        if isinstance(found, LayerFolder):
            yield snapshot_node(node.backend, found.key)


def is_elsewhere(txn: Transaction, namespace: str, blob: Blob) -> bool:
    """Say whether another namespace has the bytes of a blob too, or may have them."""
    if namespace != HOME:
        try:
            home = BLOBS.get(txn, HOME, blob.digest)
        except DataLoss:
            return True
        if home is not None and home.number == blob.number:
            return True
    others = (held for held in HOLDINGS.each(txn, blob.digest) if held.namespace != namespace)
    return any(held.number == blob.number for held in others)
