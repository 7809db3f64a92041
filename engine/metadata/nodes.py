"""What a collection walks over: nodes, and which of them each record mentions, and how.

Pure. A record holds what it mentions, with one exception: what it mentions as `BACK` holds it.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from engine import labels, times
from engine.kv import keys
from engine.kv.schema import Blob, Image, Ingest, Lease, Snapshot

__all__ = [
    "BACK",
    "CONDITION",
    "CONTENT",
    "EXPECTED",
    "IMAGE",
    "INGEST",
    "LABEL",
    "LEASE",
    "MEMBER",
    "PARENT",
    "SNAPSHOT",
    "TARGET",
    "Mention",
    "Node",
    "Object",
    "blob_node",
    "is_met",
    "is_root",
    "mentions",
    "names_content",
    "node_of",
    "snapshot_node",
    "token",
]

Object = Blob | Image | Ingest | Lease | Snapshot

# containerd's names of what a lease can hold, and leases themselves.
CONTENT = "content"
SNAPSHOT = "snapshots"
IMAGE = "images"
INGEST = "ingests"
LEASE = "leases"

PARENT = "parent"
"""A snapshot mentions what it stands on so."""
TARGET = "target"
"""An image, its manifest or index."""
MEMBER = "member"
"""A lease, what it keeps."""
EXPECTED = "expected"
"""An ingest, the blob that it may become."""
LABEL = "label"
"""Any object, what its `gc.ref` labels name."""
CONDITION = "condition"
"""Content and images, snapshots that they keep while a condition holds."""
BACK = "back"
"""Any object, what it is kept by: the one direction that is the other way round."""


_KEYS = 1 << 10  # of labels, whose meaning is remembered: there are few, on many objects


class Node(NamedTuple):
    """An object of a namespace; `backend` is empty but for a snapshot's."""

    kind: str
    backend: str
    key: str


class Mention(NamedTuple):
    """One object named by another, and how."""

    how: str
    node: Node


def blob_node(digest: str) -> Node:
    """Return the node of a blob."""
    return Node(CONTENT, "", digest)


def snapshot_node(backend: str, key: str) -> Node:
    """Return the node of a snapshot."""
    return Node(SNAPSHOT, backend, key)


def node_of(record: Object) -> Node:
    """Return the node of an object; a snapshot's record does not say what backend has it."""
    match record:
        case Snapshot():
            return Node(SNAPSHOT, "", record.key)
        case Blob():
            return Node(CONTENT, "", record.digest)
        case Image():
            return Node(IMAGE, "", record.name)
        case Ingest():
            return Node(INGEST, "", record.ref)
        case Lease():
            return Node(LEASE, "", record.id)


def token(node: Node) -> bytes:
    """Return a short name of a node, one of 2**128, for keys that have two in them."""
    return blake2b(keys.encode(node), digest_size=16).digest()


def mentions(node: Node, record: Object) -> Iterator[Mention]:
    """Yield what an object mentions; some of it may be named twice, or not exist.

    The members of a lease are records of their own.
    """
    match record:
        case Ingest(expected=str(expected)):
            yield Mention(EXPECTED, blob_node(expected))
        case Image():
            yield Mention(TARGET, blob_node(record.target.digest))
        case Snapshot() if record.parent:
            yield Mention(PARENT, snapshot_node(node.backend, record.parent))
    if not isinstance(record, Ingest) and record.labels:
        found = _of_labels(record.labels)
        conditional = isinstance(record, Blob | Image)
        yield from (mention for mention in found if conditional or mention.how != CONDITION)


def _of_labels(about: labels.Labels) -> Iterator[Mention]:
    for key, value in about.items():
        if value and (said := _said(key)):
            how, kind, backend = said
            name = value.partition("|")[2] if how == CONDITION else value
            yield Mention(how, Node(kind, backend, name or value))


@lru_cache(_KEYS)
def _said(key: str) -> tuple[str, str, str] | None:
    """Return how a label's value mentions an object, of what kind and backend; None if not at all."""
    for base, (how, kind) in _BASES.items():
        rest = key.removeprefix(base)
        if rest != key:
            if kind == SNAPSHOT:
                return how, kind, rest.partition("/")[0]
            return (how, kind, "") if not rest or rest[0] in "./" else None
    return None


_BASES: Mapping[str, tuple[str, str]] = {
    labels.GC_REF_CONTENT: (LABEL, CONTENT),
    labels.GC_REF_IMAGE: (LABEL, IMAGE),
    labels.GC_REF_SNAPSHOT: (LABEL, SNAPSHOT),
    labels.GC_COND_SNAPSHOT: (CONDITION, SNAPSHOT),
    labels.GC_BREF + "content": (BACK, CONTENT),
    labels.GC_BREF + "image": (BACK, IMAGE),
    labels.GC_BREF + "snapshot.": (BACK, SNAPSHOT),
}


def names_content(key: str) -> bool:
    """Say whether an object holds the blob whose digest is the value of its label `key`."""
    return _said(key) == (LABEL, CONTENT, "")


def is_root(kind: str, about: labels.Labels) -> bool:
    """Say whether labels keep an object of a kind by themselves.

    That is `gc.root` on content and snapshots, and a `gc.bref` to what nobody here can say is gone on
    those and on images that have expired.
    """
    return any(kind in _kept_by(key) for key in about)


@lru_cache(_KEYS)
def _kept_by(key: str) -> Collection[str]:
    if key.startswith(labels.GC_ROOT):
        return (CONTENT, SNAPSHOT)
    if key.startswith(labels.GC_BREF) and not _is_back(key):
        return (CONTENT, SNAPSHOT, IMAGE)
    return ()


def _is_back(key: str) -> bool:
    kind = key.removeprefix(labels.GC_BREF)
    return kind.startswith("snapshot.") or any(
        kind == known or kind.startswith((f"{known}.", f"{known}/")) for known in ("content", "image")
    )


def is_met(about: labels.Labels, target: Node, used_at: str | None, at: int | None) -> bool:
    """Say whether a condition of these labels for keeping a snapshot holds at the time `at`.

    `used_at` is what the snapshot's own label says, None if it has none. Several conditions, and several
    labels, are an OR. One that cannot be understood holds, and without a time all do.
    """
    for key, value in about.items():
        rest = key.removeprefix(labels.GC_COND_SNAPSHOT)
        if rest == key:
            continue
        conditions, bar, name = value.partition("|")
        is_it = snapshot_node(rest.partition("/")[0], name if bar else value) == target
        if is_it and (
            not bar or at is None or any(_holds(one, used_at, at) for one in conditions.split(","))
        ):
            return True
    return False


def _holds(condition: str, used_at: str | None, at: int) -> bool:
    used = None if used_at is None else times.moment(used_at)
    for sign in "<>":
        name, found, limit = condition.partition(sign)
        length = times.duration(limit) if found and name == "usedat" else None
        if length is not None:
            if used_at is None:
                return False
            return used is None or (at - used < length if sign == "<" else at - used > length)
    return True
