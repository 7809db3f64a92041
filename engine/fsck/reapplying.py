"""Applies the layer of a damaged snapshot again, beside it, and puts the one in the other's place.

Sync. Nothing that is mounted loses its files: who is in the way is told. A crash leaves an active
snapshot of a dead lease, or the old folder in trash, which a collection takes.
"""

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from engine import failpoints, labels
from engine.content.store import ContentStore
from engine.diff.apply import Applied
from engine.errors import DataLoss, EngineError, FailedPrecondition
from engine.failpoints import hit
from engine.kv.schema import Blob, Snapshot
from engine.metadata.leases import leased
from engine.mounts.table import MountTable
from engine.oci.digest import Digest
from engine.root import Root
from engine.snapshots import Commit, Snapshotter
from engine.unpack.jobs import ApplyJob, Arrived

__all__ = ["Again", "Apply", "apply_again"]

Apply = Callable[[ApplyJob], Applied]
"""Applies a layer in a worker process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A committed snapshot, and the blob of its layer."""

    root: Root
    namespace: str
    place: Snapshotter
    record: Snapshot
    layer: Blob


def apply_again(again: Again, apply: Apply) -> str:
    """Make a snapshot anew from its layer; say what was done.

    FailedPrecondition while it, or something that stands on it, is mounted.
    """
    place, record = again.place, again.record
    folder = again.root.snapshots / place.name / str(record.id)
    if MountTable.read().uses(folder):
        raise FailedPrecondition("it is mounted, or something that stands on it is; unmount that first")
    key = f"repair-{secrets.token_hex(6)} {record.key}"
    parent = "" if place.capabilities.rebase else record.parent
    content = ContentStore(again.root.meta, again.root.blobs, again.namespace)
    with leased(again.root.meta, again.namespace) as lease:
        # What a worker reads is held: the layer's image may go meanwhile.
        (layer,) = content.pin([Digest(again.layer.digest)], lease)
        place.prepare(key, parent, labels={labels.SNAPSHOT_REF: record.key}, lease=lease)
        hit("fsck.snapshot.prepared")
        try:
            applied = apply(_job(again, content, layer, key))
            if applied.diff_id != record.labels[labels.DIFF_ID]:
                raise DataLoss(f"blob {again.layer.digest} holds another layer")
            hit("fsck.snapshot.applied")
            left = place.replace(Commit(name=record.key, key=key, lease=lease))
        except BaseException:
            with suppress(EngineError):  # NotFound once it has replaced the other; a collection can too
                place.cleanup(only={place.remove(key)})
            raise
    stays = f"; its old files stay in {left[0].path} ({left[0].reason})" if left else ""
    return f"applied again from its layer{stays}"


def _job(again: Again, content: ContentStore, layer: Blob, key: str) -> ApplyJob:
    return ApplyJob(
        root=str(again.root.path),
        number=layer.number,
        arrived=Arrived(layer.size, is_whole=True),
        diff_id=again.record.labels[labels.DIFF_ID],
        target=again.place.sink(key),
        data=content.small(layer),
        failpoints=failpoints.terms(),
    )
