"""Explains what an open store keeps, and why: with the names of mounts, and of what people ask for.

Sync.
"""

from contextlib import suppress
from dataclasses import replace

from engine.errors import NotFound
from engine.gc.explain import Explained, Keeper, Kept, explain, explain_node
from engine.metadata.lineage import full_key
from engine.metadata.nodes import IMAGE, SNAPSHOT, Node, blob_node, snapshot_node
from engine.oci.short import beginnings
from engine.stores import Stores

__all__ = ["CONTAINER", "MOUNT", "explain_named", "explain_store"]

MOUNT = "mounts"
"""The kind of what holds a mount's snapshot; its key is the mount's name."""

CONTAINER = "containers"
"""The kind of what holds a container's snapshots; its key is the container's ID."""


def explain_store(stores: Stores) -> Explained:
    """Explain everything: what a collection would take, and what holds the rest."""
    explained = explain(stores.root.meta, stores.places(vanished=stores.mounting.claims.stale()))
    mounts = _mounts(stores)
    held = [replace(one, holder=mounts.get(one.holder.node, one.holder)) for one in explained.held]
    return replace(explained, held=held)


def explain_named(stores: Stores, text: str) -> list[Kept]:
    """Explain all that `text` names: an image, a blob by its digest, a snapshot by its key. NotFound."""
    found = _named(stores, text)
    if not found:
        raise NotFound(f"no image, blob or snapshot {text}")
    mounts = _mounts(stores)
    explained = (explain_node(stores.root.meta, stores.namespace, node) for node in found)
    return [
        replace(kept, holder=mounts.get(kept.holder.node, kept.holder)) if kept.holder else kept
        for kept in explained
    ]


def _named(stores: Stores, text: str) -> list[Node]:
    found: list[Node] = []
    if beginnings(text):
        with suppress(NotFound):
            found.append(blob_node(stores.content.find(text)))
    elif image := stores.images.named(text):
        found.append(Node(IMAGE, "", image.name))
    for backend in stores.snapshotters():
        key = full_key(stores.root.meta, backend.name, stores.namespace, text)
        if key is None:
            with suppress(NotFound):
                key = backend.stat(text).key
        if key is not None:
            found.append(snapshot_node(backend.name, key))
    return found


def _mounts(stores: Stores) -> dict[Node, Keeper]:
    """Return what to say of the snapshots that are mounted, or kept for a mount."""
    return {
        Node(SNAPSHOT, record.backend, record.key): Keeper(
            Node(CONTAINER, "", record.container)
            if record.container
            else Node(MOUNT, record.backend, record.key),
            f"{record.state} at {record.target}",
        )
        for record in stores.mounting.walk()
    }
