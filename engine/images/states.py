"""How far images are: resolved, fetching, fetched, unpacked; and what can be done with each.

Sync; safe from any thread. Nothing of it is a record: it is told from what is in the store, in one
transaction, so that it is true after a crash too, and when somebody removed a part.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine import labels
from engine.content.image import ResolvedImage
from engine.content.keeping import required
from engine.errors import DataLoss, EngineError
from engine.kv.environment import Transaction
from engine.kv.schema import BLOBS, SNAPSHOTS
from engine.metadata import unflushed
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.snapshots import Kind
from engine.stores import Stores

__all__ = ["ImageState", "Parts", "State", "Use", "parts_of", "pulls", "stands", "state_of"]


class State(StrEnum):
    """How far an image is."""

    RESOLVED = "resolved"
    """What its name means is known, nothing of its layers is here."""
    FETCHING = "fetching"
    """Some of it is here; a pull is at work, or was and is to be gone on with."""
    FETCHED = "fetched"
    """All that it keeps is here."""
    UNPACKED = "unpacked"
    """A backend has it: it can be run at once."""
    INCOMPLETE = "incomplete"
    """It has a name, but a part that it keeps is gone, and no backend has it."""


class Use(StrEnum):
    """What an image is good for as it is."""

    RUN = "run"
    UNPACK = "unpack"
    """For any backend, also again."""
    EXPORT = "export"
    """And push: all its blobs are here."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is here of one image for one platform: `there` of `size` bytes, and where it is unpacked."""

    there: int
    size: int
    missing: tuple[Digest, ...] = ()
    """What of its blobs is not here,"""
    lost: tuple[Digest, ...] = ()
    """and of these what it is meant to keep: the others were dropped after it was unpacked, and are not
    needed while it is."""
    unpacked: Mapping[str, str] = field(default_factory=dict)
    """The chain ID by backend."""
    is_empty: bool = False
    """It has no layers: there is nothing to unpack."""

    @property
    def state(self) -> State:
        """How far an image is that has a name."""
        if self.unpacked:
            return State.UNPACKED
        return State.INCOMPLETE if self.lost else State.FETCHED

    @property
    def uses(self) -> frozenset[Use]:
        """What can be done with it."""
        found = {Use.UNPACK, Use.EXPORT} if not self.missing else set()
        return frozenset(found | ({Use.RUN} if self.unpacked or self.is_empty else set()))


@dataclass(frozen=True, slots=True)
class ImageState:
    """A name, or a pull that did not put its name yet, and how far its image is."""

    name: str
    state: State
    target: Descriptor | None
    is_named: bool
    parts: Parts
    """Of the image for this machine, of several."""
    lease: str = ""
    """Of a pull: what keeps what it has fetched."""
    puller: str = ""
    """Who is at work on the pull, if anybody."""
    pulled_with: frozenset[str] = frozenset()
    """Marks of the credentials that it was pulled with (`engine.registry.credentials.mark`)."""


def pulls(stores: Stores) -> Iterator[ImageState]:
    """Yield how far each pull is that did not put its name yet, the oldest first."""
    known = [backend.name for backend in stores.snapshotters()]
    for pull in stores.pulls.walk():
        parts = _parts(stores, pull.target, known, coming=True) if pull.target else None
        yield ImageState(
            name=pull.reference,
            state=_of_pull(parts),
            target=pull.target,
            is_named=False,
            parts=parts or Parts(0, 0),
            lease=pull.lease,
            puller=pull.owner,
            pulled_with=_pulled_with(stores, pull.target),
        )


def state_of(stores: Stores, name: str) -> ImageState:
    """Return how far the image of a name is. Raises NotFound, InvalidArgument."""
    image = stores.images.get(name)
    parts = _parts(stores, image.target, [backend.name for backend in stores.snapshotters()])
    return ImageState(
        name=image.name,
        state=parts.state if parts else State.INCOMPLETE,
        target=image.target,
        is_named=True,
        parts=parts or Parts(0, 0),
        pulled_with=_pulled_with(stores, image.target),
    )


def _of_pull(parts: Parts | None) -> State:
    if parts is None or not parts.there:
        return State.RESOLVED
    return State.FETCHING if parts.missing else State.FETCHED


def _parts(
    stores: Stores, target: Descriptor, backends: Collection[str], *, coming: bool = False
) -> Parts | None:
    """Return what is here of what a descriptor means, None if its documents are not."""
    try:
        found = stores.present(target, coming=coming)
    except EngineError:
        return None
    return parts_of(stores, found[0], backends) if found else None


def parts_of(stores: Stores, image: ResolvedImage, backends: Collection[str] | None = None) -> Parts:
    """Return what is here of an image, seen at one moment, as far as some backends or all have it.

    DataLoss where that cannot be told.
    """
    known = [one.name for one in stores.snapshotters()] if backends is None else backends
    blobs = {part.key: part for part in (*image.path, image.manifest.config, *image.manifest.layers)}
    namespace, config = stores.namespace, image.manifest.config.key
    with stores.root.meta.read() as txn:
        here = {digest: BLOBS.get(txn, namespace, digest) for digest in blobs}
        anchored = labels.snapshot_refs(found.labels if (found := here[config]) else {})
        unpacked = {
            backend: key
            for backend, key in anchored  # which somebody may have set by hand
            if backend in known and key in image.chain[-1:] and stands(txn, backend, namespace, key)
        }
    manifest = here[image.path[-1].key]
    kept = {part.digest for part in required(image, manifest.labels if manifest else {})}
    missing = tuple(digest for digest, blob in here.items() if blob is None)
    coming = {one.expected: one.offset for one in stores.content.statuses()} if missing else {}
    sizes = {layer.key: layer.size for layer in image.manifest.layers}
    return Parts(
        there=sum(size if here[digest] else coming.get(digest, 0) for digest, size in sizes.items()),
        size=sum(sizes.values()),
        missing=missing,
        lost=tuple(digest for digest in missing if digest in kept or not unpacked),
        unpacked=unpacked,
        is_empty=not image.chain,
    )


def stands(txn: Transaction, backend: str, namespace: str, key: str) -> bool:
    """Say whether a snapshot is there and would be served: damaged or in doubt it would not be."""
    try:
        found = SNAPSHOTS.get(txn, backend, namespace, key)
        if found is None or found.kind != Kind.COMMITTED:
            return False
        unflushed.check(txn, backend, found)
    except DataLoss:
        return False
    return True


def _pulled_with(stores: Stores, target: Descriptor | None) -> frozenset[str]:
    if target is None:
        return frozenset()
    try:
        about = stores.content.info(target.key).labels
    except EngineError:
        return frozenset()
    marks = (key.removeprefix(labels.PULLED_WITH) for key in about if key.startswith(labels.PULLED_WITH))
    return frozenset(marks)
