"""Checks that everything that images need is here, and notes which layers they are made of.

Sync. Of an index only what is for a platform that was brought in has to be here.
"""

from collections.abc import Collection, Iterator

from engine import labels
from engine.content.image import ResolvedImage
from engine.content.keeping import is_kept, required
from engine.content.present import present
from engine.content.store import ContentStore
from engine.errors import DataLoss, EngineError, NotFound, Refused
from engine.fsck.findings import Counts, Finding, Trouble, What
from engine.fsck.records import Read
from engine.kv.schema import IMAGES, SNAPSHOTS, Image
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.root import Root

__all__ = ["blobs_of", "check_images"]


def check_images(
    root: Root,
    platform: Platform,
    read: Read,
    counts: Counts,
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[Trouble]:
    """Look through the images of all namespaces, or `only` those: namespaces and names."""
    for batch in IMAGES.batches(root.meta):
        for (namespace, *_), image in batch:
            if only is not None and (namespace, image.name) not in only:
                continue
            counts.images += 1
            content = ContentStore(root.meta, root.blobs, namespace)
            try:
                found = _present(content, image, platform)
                for one in found:
                    _note_layers(one, namespace, read)
                    _check_complete(root, namespace, content, one)
                if not found:
                    raise NotFound(f"nothing of {image.target.digest} is here")
            except EngineError as error:
                with root.meta.read() as txn:
                    if IMAGES.get(txn, namespace, image.name) != image:
                        continue  # it was removed, or moved, while it was looked at
                finding = Finding(
                    what=What.IMAGE,
                    name=familiar(image.name),
                    namespace=namespace,
                    detail=f"{error}; import or pull it again",
                )
                yield Trouble(finding)


def _present(content: ContentStore, image: Image, platform: Platform) -> list[ResolvedImage]:
    def read(descriptor: Descriptor, limit: int) -> bytes:
        return content.read_all(descriptor.key, limit)

    def is_here(descriptor: Descriptor) -> bool:
        try:
            return is_kept(content.info(descriptor.key).labels)
        except (NotFound, Refused):
            return False

    return present(image.target, platform, read, is_here)


def _check_complete(root: Root, namespace: str, content: ContentStore, image: ResolvedImage) -> None:
    manifest = content.info(image.path[-1].key)
    needed = required(image, manifest.labels)
    content.check_all(part.key for part in needed)
    dropped = [layer.key for layer in image.manifest.layers if layer not in needed]
    if dropped and not _is_unpacked(root, namespace, content, image):
        content.check_all(dropped)


def _is_unpacked(root: Root, namespace: str, content: ContentStore, image: ResolvedImage) -> bool:
    kept = labels.snapshot_refs(content.info(image.manifest.config.key).labels)
    tops = [(backend, key) for backend, key in kept if key in image.chain[-1:]]
    with root.meta.read() as txn:
        return any(SNAPSHOTS.any(txn, backend, namespace, key) for backend, key in tops)


def _note_layers(image: ResolvedImage, namespace: str, read: Read) -> None:
    """Note the layers that snapshots were made of, whatever their own labels say."""
    for layer in image.layers:
        known = read.layers.get((namespace, layer.diff_id))
        if known is not None and layer.descriptor.digest not in known:
            known.append(layer.descriptor.digest)


def blobs_of(
    root: Root, namespace: str, image: Image, platform: Platform
) -> tuple[set[Digest], list[ResolvedImage]]:
    """Return the blobs that an image is made of, as far as it can be read, and what it means."""
    content = ContentStore(root.meta, root.blobs, namespace)
    try:
        found = _present(content, image, platform)
    except (NotFound, DataLoss, Refused):
        return {Digest(image.target.digest)}, []
    parts = {
        part.key for one in found for part in (*one.path, one.manifest.config, *one.manifest.layers)
    }
    return parts, found
