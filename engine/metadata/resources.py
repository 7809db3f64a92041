"""What a lease holds, by type and ID as containerd names it: `content`, `snapshots/overlay`, …

Pure.
"""

from typing import NamedTuple

from engine.errors import InvalidArgument, NotSupported, Refused, printable
from engine.metadata.nodes import CONTENT, IMAGE, INGEST, SNAPSHOT, Node, blob_node, snapshot_node
from engine.oci.digest import parse_digest
from engine.oci.reference import parse_reference

__all__ = ["Resource", "parse_resource", "resource"]


class Resource(NamedTuple):
    """An object of a namespace, for people and programs."""

    type: str
    id: str


def resource(node: Node) -> Resource:
    """Return a node as containerd names it."""
    return Resource(f"{node.kind}/{node.backend}" if node.backend else node.kind, node.key)


def parse_resource(found: Resource) -> Node:
    """Return the node that is meant; image names may be familiar ones.

    NotSupported for a type that no lease holds, InvalidArgument for an ID that is none of its type.
    """
    kind, slash, backend = found.type.partition("/")
    if kind == SNAPSHOT and not backend:
        raise InvalidArgument(f"a lease holds snapshots of a backend; write {SNAPSHOT}/NAME")
    if kind not in {CONTENT, IMAGE, INGEST, SNAPSHOT} or (slash and kind != SNAPSHOT):
        raise NotSupported(
            f"a lease holds no {printable(found.type)}; "
            f"it holds {CONTENT}, {INGEST}, {IMAGE} and {SNAPSHOT}/BACKEND"
        )
    if not found.id:
        raise InvalidArgument(f"a resource of type {kind} needs an ID")
    if kind == IMAGE:
        return Node(IMAGE, "", str(parse_reference(found.id)))
    if kind == SNAPSHOT:
        return snapshot_node(backend, found.id)
    if kind == INGEST:
        return Node(INGEST, "", found.id)
    try:
        return blob_node(parse_digest(found.id))
    except Refused as error:
        raise InvalidArgument(str(error)) from None
