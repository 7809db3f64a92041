"""What JSON says of each kind of thing, the same in every command; docs/json.md describes it.

Sync. A field that cannot be told, as of a damaged record, is left out, and `error` says why.
"""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from engine.compacting import Compacted
from engine.content.image import ResolvedImage
from engine.errors import EngineError, NotFound
from engine.images.states import ImageState, parts_of
from engine.kv.schema import Blob, Image, Lease, MountRecord, Namespace
from engine.labels import GC_FLAT
from engine.metadata.leases import expiry
from engine.oci.documents import Descriptor
from engine.plugins import Backend
from engine.snapshots import Info, Usage
from engine.stores import Stores
from engine.times import rfc3339

if TYPE_CHECKING:  # which loads what works on an event loop
    from engine.registry.sending import Pushed

__all__ = [
    "ImageDetails",
    "LeaseDetails",
    "ShownBackend",
    "ShownBlob",
    "ShownCompaction",
    "ShownImage",
    "ShownLease",
    "ShownMount",
    "ShownNamespace",
    "ShownPart",
    "ShownPush",
    "ShownResource",
    "ShownSnapshot",
    "SnapshotName",
    "backend",
    "blob",
    "compaction",
    "details",
    "image",
    "images",
    "lease",
    "lease_details",
    "mount",
    "namespace",
    "pull",
    "pushed",
    "snapshot",
]

_REMEMBERED = 1000  # images, in case that one has many names
_RELEASE_EVERY = 100  # images looked at between two calls that give the memory of that back


class ShownImage(msgspec.Struct, frozen=True, kw_only=True):
    """A name, and the image that it means here: of several platforms the best for this machine."""

    name: str
    digest: str | UnsetType = UNSET
    media_type: str | UnsetType = UNSET
    platform: str | UnsetType = UNSET
    platforms: list[str] | UnsetType = UNSET
    layers: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    created: str | UnsetType = UNSET
    updated: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    uses: list[str] | UnsetType = UNSET
    fetched: int | UnsetType = UNSET
    puller: str | UnsetType = UNSET
    unpacked: dict[str, str] | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ImageDetails(ShownImage, frozen=True, kw_only=True):
    """An image with the documents that it is made of."""

    manifest: Any
    config: Any
    chain_ids: list[str]


class ShownBlob(msgspec.Struct, frozen=True, kw_only=True):
    """A blob."""

    digest: str
    size: int | UnsetType = UNSET
    created: str | UnsetType = UNSET
    updated: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    error: str | UnsetType = UNSET


class SnapshotName(msgspec.Struct, frozen=True, kw_only=True):
    """What names a snapshot."""

    snapshotter: str
    key: str


class ShownSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a backend; what it takes up itself only where that was asked for."""

    snapshotter: str
    key: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    created: str | UnsetType = UNSET
    updated: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    size: int | UnsetType = UNSET
    inodes: int | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mount, or what a writable one keeps."""

    name: str
    target: str | UnsetType = UNSET
    image: str | UnsetType = UNSET
    snapshotter: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    rw: bool | UnsetType = UNSET
    state: str | UnsetType = UNSET
    created: str | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownBackend(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshotter and whether it works here."""

    name: str
    unpacks: bool
    mounts: bool
    reason: str


class ShownLease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease, and how much it holds."""

    id: str
    created: str | UnsetType = UNSET
    expires: str | UnsetType = UNSET
    live: bool | UnsetType = UNSET
    flat: bool | UnsetType = UNSET
    owner: str | UnsetType = UNSET
    holds: int | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownResource(msgspec.Struct, frozen=True):
    """What a lease holds, as containerd names it."""

    type: str
    id: str


class LeaseDetails(ShownLease, frozen=True, kw_only=True):
    """A lease and what it holds."""

    resources: list[ShownResource]


class ShownNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace; its times are known only where it was made or labelled."""

    name: str
    isolated: bool | UnsetType = UNSET
    created: str | UnsetType = UNSET
    updated: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    error: str | UnsetType = UNSET


class ShownCompaction(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was compacted, or was as small as it can be; before and after."""

    name: str
    size_before: int
    size: int
    disk_before: int
    disk: int


class ShownPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an image that a registry has now."""

    digest: str
    way: str


class ShownPush(msgspec.Struct, frozen=True, kw_only=True):
    """An image that a registry has now, and how it came there."""

    name: str
    digest: str
    media_type: str
    bytes_sent: int
    parts: list[ShownPart]
    left_out: list[str]


def image(stores: Stores, record: Image) -> ShownImage:
    """Return what there is to say of an image; what is wrong with it as its `error`."""
    return images(stores)(record)


def images(stores: Stores) -> Callable[[Image], ShownImage]:
    """Return what `image` would say, for many: the backends are looked up once.

    So is an image of many names.
    """
    backends, looked = [backend.name for backend in stores.snapshotters()], count(1)

    @lru_cache(_REMEMBERED)
    def look(media_type: str, digest: str, size: int) -> dict[str, Any]:
        if next(looked) % _RELEASE_EVERY == 0:
            stores.root.meta.release_pages()
            stores.root.blobs.release_pages()
        target = Descriptor(media_type=media_type, digest=digest, size=size)
        try:
            found = stores.present(target)
            if not found:
                raise NotFound(f"nothing of {digest} is in the store; import it again")
            return _seen(stores, found, backends)
        except EngineError as error:
            return {"error": str(error)}

    def tell(record: Image) -> ShownImage:
        target = record.target
        return ShownImage(
            name=record.name,
            digest=target.digest,
            media_type=target.media_type,
            created=rfc3339(record.created),
            updated=rfc3339(record.updated),
            labels=record.labels,
            **look(target.media_type, target.digest, target.size),
        )

    return tell


def _seen(stores: Stores, found: Sequence[ResolvedImage], backends: Collection[str]) -> dict[str, Any]:
    """Return what is to be seen of the images under a name."""
    parts = [parts_of(stores, one, backends) for one in found]
    lost = next((digest for one in parts for digest in one.lost), None)
    return {
        "platform": str(found[0].config.platform),
        "platforms": [str(one.config.platform) for one in found],
        "layers": len(found[0].manifest.layers),
        "size": _size(found, {digest for one in parts for digest in one.missing}),
        "state": parts[0].state,
        "uses": sorted(parts[0].uses),
        "unpacked": parts[0].unpacked,
        "error": f"no blob {lost}" if lost else UNSET,
    }


def pull(state: ImageState) -> ShownImage:
    """Return what there is to say of a pull that did not put its name yet."""
    target = state.target
    return ShownImage(
        name=state.name,
        digest=target.digest if target else UNSET,
        media_type=target.media_type if target else UNSET,
        state=state.state,
        size=state.parts.size,
        fetched=state.parts.there,
        puller=state.puller or UNSET,
    )


def _size(images: Sequence[ResolvedImage], missing: Collection[str]) -> int:
    """Return what the blobs of images take up together that are here, each counted once."""
    parts = {
        part.digest: part.size
        for image in images
        for part in (*image.path, image.manifest.config, *image.manifest.layers)
        if part.digest not in missing
    }
    return sum(parts.values())


def details(
    about: ShownImage, resolved: ResolvedImage, manifest: object, config: object
) -> ImageDetails:
    """Return an image of one platform with the documents that it is made of."""
    shown = {
        **msgspec.structs.asdict(about),
        "platform": str(resolved.config.platform),
        "layers": len(resolved.manifest.layers),
    }
    return ImageDetails(**shown, manifest=manifest, config=config, chain_ids=list(resolved.chain))


def blob(record: Blob) -> ShownBlob:
    """Return what there is to say of a blob."""
    return ShownBlob(
        digest=record.digest,
        size=record.size,
        created=rfc3339(record.created),
        updated=rfc3339(record.updated),
        labels=record.labels,
    )


def snapshot(snapshotter: str, info: Info, usage: Usage | None = None) -> ShownSnapshot:
    """Return what there is to say of a snapshot."""
    return ShownSnapshot(
        snapshotter=snapshotter,
        key=info.key,
        kind=info.kind,
        parent=info.parent,
        created=rfc3339(info.created),
        updated=rfc3339(info.updated),
        labels=info.labels,
        size=usage.size if usage else UNSET,
        inodes=usage.inodes if usage else UNSET,
    )


def mount(record: MountRecord, state: str | None = None) -> ShownMount:
    """Return what there is to say of a mount, in its own state or in another."""
    return ShownMount(
        name=record.key,
        target=record.target,
        image=record.image,
        snapshotter=record.backend,
        parent=record.top,
        rw=record.rw,
        state=state or record.state,
        created=rfc3339(record.created),
    )


def backend(found: Backend) -> ShownBackend:
    """Return what there is to say of a backend."""
    probe = found.probe
    return ShownBackend(name=found.name, unpacks=probe.unpacks, mounts=probe.mounts, reason=probe.reason)


def lease(stores: Stores, record: Lease) -> ShownLease:
    """Return what there is to say of a lease."""
    expires = expiry(record)
    return ShownLease(
        id=record.id,
        created=rfc3339(record.created),
        expires=UNSET if expires is None else rfc3339(expires),
        live=stores.leases.is_live(record),
        flat=GC_FLAT in record.labels,
        owner=str(record.owner) if record.owner else UNSET,
        holds=len(stores.leases.members(record.id)),
        labels=record.labels,
    )


def lease_details(stores: Stores, record: Lease) -> LeaseDetails:
    """Return a lease with what it holds."""
    held = [ShownResource(*one) for one in stores.leases.resources(record.id)]
    return LeaseDetails(**msgspec.structs.asdict(lease(stores, record)), resources=held)


def namespace(record: Namespace) -> ShownNamespace:
    """Return what there is to say of a namespace."""
    return ShownNamespace(
        name=record.name,
        isolated=record.isolated,
        created=rfc3339(record.created) if record.created else UNSET,
        updated=rfc3339(record.updated) if record.updated else UNSET,
        labels=record.labels,
    )


def pushed(found: "Pushed") -> ShownPush:
    """Return what a registry has now, and how it came there."""
    return ShownPush(
        name=str(found.reference),
        digest=found.target.digest,
        media_type=found.target.media_type,
        bytes_sent=found.bytes_sent,
        parts=[ShownPart(digest=digest, way=way) for digest, way in found.ways.items()],
        left_out=[layer.digest for layer in found.left_out],
    )


def compaction(file: Compacted) -> ShownCompaction:
    """Return what became of a file."""
    return ShownCompaction(
        name=file.name,
        size_before=file.size_before,
        size=file.size_after,
        disk_before=file.disk_before,
        disk=file.disk_after,
    )
