"""Who holds one object, or a few: found from these alone, whatever else a store has.

Sync. A collection reads everything once; these look up who mentions an object, and who mentions that.
What cannot be read holds what it mentions, and so does a condition, whether or not it is met.
"""

from collections.abc import Collection, Iterator, MutableMapping
from typing import NamedTuple

from engine.content import discard
from engine.errors import DataLoss, FailedPrecondition, NotFound
from engine.gc.mark import holders_first
from engine.gc.survey import ingest_lives
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import Blob, Image, Ingest, Lease, Snapshot, now
from engine.metadata import ledger, lineage
from engine.metadata.leases import expiry, finish, is_live
from engine.metadata.nodes import (
    BACK,
    CONTENT,
    IMAGE,
    INGEST,
    LEASE,
    SNAPSHOT,
    Mention,
    Node,
    blob_node,
    is_root,
)
from engine.oci.reference import familiar
from engine.processes import Owners
from engine.snapshots import Kind

__all__ = [
    "Dropped",
    "closure",
    "give_up",
    "holder",
    "holders",
    "only_held_by",
    "remove_blob",
    "stands",
]


class Dropped(NamedTuple):
    """What was dropped, by the numbers of its files and bytes: snapshots by backend, and blobs."""

    snapshots: dict[str, list[int]]
    blobs: list[int]


def stands(owners: Owners, txn: Transaction, namespace: str, node: Node, at: int | None = None) -> bool:
    """Say whether an object is kept by itself; `at` a time, or until it is collected."""
    try:
        record = ledger.get(txn, namespace, node)
    except DataLoss:
        return True
    match record:
        case Lease():
            found = is_live(owners, record, at)
        case Ingest():
            found = ingest_lives(owners, record, now())
        case Snapshot():
            in_use = record.kind != Kind.COMMITTED and not record.lease
            found = in_use or is_root(SNAPSHOT, record.labels)
        case Blob():
            found = is_root(CONTENT, record.labels)
        case Image():
            expires = expiry(record) if at else None
            found = expires is None or expires > (at or 0) or is_root(IMAGE, record.labels)
        case _:
            found = False
    return found


def holders(txn: Transaction, namespace: str, node: Node) -> Iterator[Node]:
    """Yield what holds an object by mentioning it, or by being mentioned by it."""
    for mention in ledger.mentioners(txn, namespace, node):
        if mention.how != BACK:
            yield mention.node
    for mention in _mentioning(txn, namespace, node):
        if mention.how == BACK and ledger.exists(txn, namespace, mention.node):
            yield mention.node


def _mentioning(txn: Transaction, namespace: str, node: Node) -> Collection[Mention]:
    try:
        return ledger.mentioning(txn, namespace, node)
    except DataLoss:
        return ()


def holder(
    owners: Owners,
    txn: Transaction,
    namespace: str,
    node: Node,
    *,
    but: Collection[Node] = (),
    at: int | None = None,
    known: MutableMapping[Node, Node | None] | None = None,
) -> Node | None:
    """Return something that keeps an object: an image, a lease, a snapshot in use, a root or None.

    What is only held by way of nodes in `but` is not held, nor, with a time `at`, by what has expired:
    without one that holds until it is collected. `known` is what was found out so far, for who asks of
    several objects the same.
    """
    known = {} if known is None else known
    # One holder after the other, as far up as it goes: a layer of many images is held by the first.
    ways = [iter((node,))]
    path: list[Node] = []
    seen = set(but)
    while ways:
        one = next(ways[-1], None)
        if one is None:
            ways.pop()
            del path[-1:]
            continue
        if one in seen:
            continue
        seen.add(one)
        path.append(one)
        found = known.get(one)
        if one not in known and stands(owners, txn, namespace, one, at):
            found = one
        if found is not None:
            known.update(dict.fromkeys(path, found))
            return found
        ways.append(iter(()) if one in known else holders(txn, namespace, one))
    known.update(dict.fromkeys(seen.difference(but)))
    return None


def closure(txn: Transaction, namespace: str, node: Node) -> list[Node]:
    """Return an object that is there and all that it holds that is."""
    pending, found = [node], dict[Node, None]()
    while pending:
        at = pending.pop()
        if at not in found and ledger.exists(txn, namespace, at):
            found[at] = None
            pending += ledger.held(txn, namespace, at)
    return list(found)


def only_held_by(
    owners: Owners, txn: Transaction, namespace: str, nodes: Collection[Node], gone: Collection[Node]
) -> list[Node]:
    """Return which of `nodes` nothing holds but what is `gone`, and they each other; holders first.

    Garbage that holds one of them counts as if it were held: a collection takes both.
    """
    own = set(nodes)
    ending = own.union(gone)
    pending = [
        node
        for node in own.difference(gone)
        if (stands(owners, txn, namespace, node) and not _is_work_of(txn, namespace, node, gone))
        or any(
            _holds_still(owners, txn, namespace, one)
            for one in holders(txn, namespace, node)
            if one not in ending
        )
    ]
    held: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in held:
            held.add(node)
            pending += own.intersection(ledger.held(txn, namespace, node))
    free = [node for node in nodes if node not in held]
    return holders_first(free, lambda node: ledger.held(txn, namespace, node))


def _is_work_of(txn: Transaction, namespace: str, node: Node, leases: Collection[Node]) -> bool:
    """Say whether an object is an ingest of one of some leases: it goes with the work."""
    record = ledger.get(txn, namespace, node) if node.kind == INGEST else None
    return isinstance(record, Ingest) and Node(LEASE, "", record.lease) in leases


def _holds_still(owners: Owners, txn: Transaction, namespace: str, node: Node) -> bool:
    """Say whether an object is there, and if it is a lease, holds on."""
    if node.kind == LEASE:
        return stands(owners, txn, namespace, node)
    return ledger.exists(txn, namespace, node)


def give_up(meta: Environment, namespace: str, lease: str) -> Dropped:
    """End a lease whose work failed, drop what it made and nothing else holds, and return that.

    Other garbage stays for a collection: failing is no reason to take what someone may still want.
    """
    gone = Node(LEASE, "", lease)
    with meta.write() as txn:
        made = ledger.members(txn, namespace, lease, made=True)
        free = only_held_by(meta.owners, txn, namespace, made, [gone])
        ledger.drop(txn, namespace, gone)
        dropped = _drop(txn, namespace, lease, free)
    finish(meta, namespace, lease)
    return dropped


def _drop(txn: Transaction, namespace: str, lease: str, nodes: Collection[Node]) -> Dropped:
    dropped = Dropped({}, [])
    for node in nodes:
        record = ledger.get(txn, namespace, node)
        number = None
        if node.kind == CONTENT:
            blob = discard.drop_blob(txn, namespace, node.key)
            number = blob.number if blob else None
        elif isinstance(record, Ingest) and record.lease == lease:
            number = discard.drop_ingest(txn, namespace, node.key)
        elif isinstance(record, Snapshot):
            lineage.drop(txn, node.backend, namespace, record)
            dropped.snapshots.setdefault(node.backend, []).append(record.id)
        if number is not None:
            dropped.blobs.append(number)
    return dropped


def remove_blob(meta: Environment, namespace: str, digest: str) -> int | None:
    """Drop one blob that nothing holds; return the number of its bytes, None if it can't be told.

    Raises NotFound, and FailedPrecondition that names a holder.
    """
    node = blob_node(digest)
    with meta.write() as txn:
        if not ledger.exists(txn, namespace, node):
            raise NotFound(f"no blob {digest}")
        found = holder(meta.owners, txn, namespace, node)
        if found is not None and found.kind == IMAGE:
            raise FailedPrecondition(
                f"blob {digest} belongs to image {familiar(found.key)}; remove the image, "
                "then run `lamina gc`"
            )
        if found is not None:
            raise FailedPrecondition(f"blob {digest} is held by {_told(found)}")
        ledger.note_deletion(txn, namespace)
        blob = discard.drop_blob(txn, namespace, digest)
        return blob.number if blob else None


def _told(node: Node) -> str:
    if node.kind in {LEASE, INGEST}:
        return f"work under way ({node.kind[:-1]} {node.key}); try again later"
    if node.kind == SNAPSHOT:
        return f"snapshot {node.key} of {node.backend}, which is in use"
    return f"a label of blob {node.key}"
