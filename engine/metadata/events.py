"""What becomes of images, content and snapshots, as events with containerd's topics and fields.

Pure. The ledger notes what each transaction changes; once that is durable, this says what it means.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from engine.kv.schema import Blob, Image, Snapshot
from engine.metadata.nodes import CONTENT, IMAGE, SNAPSHOT, Node, Object
from engine.snapshots import Kind

__all__ = ["Change", "Event", "Topic", "events"]


class Change(NamedTuple):
    """A record that a transaction made, changed or removed."""

    namespace: str
    node: Node
    before: Object | None
    after: Object | None


class Topic(StrEnum):
    """What happened; as in containerd."""

    IMAGE_CREATE = "/images/create"
    IMAGE_UPDATE = "/images/update"
    IMAGE_DELETE = "/images/delete"
    CONTENT_CREATE = "/content/create"
    CONTENT_DELETE = "/content/delete"
    SNAPSHOT_PREPARE = "/snapshot/prepare"
    SNAPSHOT_COMMIT = "/snapshot/commit"
    SNAPSHOT_REMOVE = "/snapshot/remove"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, and is durable. `at` is nanoseconds since the epoch."""

    topic: Topic
    namespace: str
    at: int
    key: str
    """The image's name, the blob's digest, the snapshot's key."""
    labels: Mapping[str, str] = {}
    """Those of an image, as they are now."""
    target: str = ""
    """The digest that an image's name means now."""
    size: int = 0
    """That of a blob."""
    snapshotter: str = ""
    parent: str = ""
    """What a prepared snapshot stands on."""
    name: str = ""
    """What a snapshot is called once it is committed."""


def events(changes: Sequence[Change], at: int) -> Iterator[Event]:
    """Yield what the changes of one transaction mean, in order; most mean nothing to others."""
    left = iter(zip(changes, [*changes[1:], None], strict=True))
    for change, following in left:
        kind, is_other = change.node.kind, change.before is not None and change.after is not None
        if kind == IMAGE:
            yield from _of_image(change, at)
        elif kind == CONTENT and not is_other:
            yield _of_blob(change, at)
        elif kind == SNAPSHOT and not is_other:
            name = _committed_as(change, following)
            if name:
                next(left)
            yield _of_snapshot(change, name, at)


def _of_blob(change: Change, at: int) -> Event:
    blob = change.after or change.before
    return Event(
        topic=Topic.CONTENT_CREATE if change.after else Topic.CONTENT_DELETE,
        namespace=change.namespace,
        at=at,
        key=change.node.key,
        size=blob.size if isinstance(blob, Blob) else 0,
    )


def _of_image(change: Change, at: int) -> Iterator[Event]:
    before, after = change.before, change.after
    about = after or before
    assert about is None or isinstance(about, Image)
    if isinstance(before, Image) and isinstance(after, Image):
        if (before.target, before.labels) == (after.target, after.labels):
            return  # noted that it was used
        topic = Topic.IMAGE_UPDATE
    else:
        topic = Topic.IMAGE_CREATE if after else Topic.IMAGE_DELETE
    yield Event(
        topic=topic,
        namespace=change.namespace,
        at=at,
        key=change.node.key,
        labels=dict(about.labels) if about else {},
        target=about.target.digest if about else "",
    )


def _committed_as(change: Change, following: Change | None) -> str:
    """Return what an active snapshot is called from now on, if it goes by becoming a committed one."""
    if change.after is not None or following is None or following.before is not None:
        return ""
    record, node = following.after, following.node
    is_same = (node.kind, node.backend) == (change.node.kind, change.node.backend)
    if not is_same or not isinstance(record, Snapshot) or record.kind != Kind.COMMITTED:
        return ""
    return record.key


def _of_snapshot(change: Change, name: str, at: int) -> Event:
    record = change.after
    if name:
        topic = Topic.SNAPSHOT_COMMIT
    else:
        topic = Topic.SNAPSHOT_PREPARE if record else Topic.SNAPSHOT_REMOVE
    return Event(
        topic=topic,
        namespace=change.namespace,
        at=at,
        key=change.node.key,
        snapshotter=change.node.backend,
        parent=record.parent if isinstance(record, Snapshot) else "",
        name=name,
    )
