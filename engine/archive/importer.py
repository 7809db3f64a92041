"""Brings the images of a folder or an archive into the content store.

Sync. Every byte is hashed on the way in; names in an archive only find files, digests decide what they
are. All is pinned by the caller's lease; naming the images is the caller's last step.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from engine import labels, limits
from engine.archive.contents import DockerImage, OciImage, find_images, read_small
from engine.archive.source import Source, open_source
from engine.content.image import ResolvedImage, resolve
from engine.content.store import BeingWritten, ContentStore
from engine.content.writer import Writer
from engine.diff.decompress import sniff
from engine.errors import AlreadyExists, DigestMismatch, NotFound, Refused, printable
from engine.failpoints import hit
from engine.oci.digest import Digest, digest_of, hasher, parse_digest
from engine.oci.documents import Descriptor, Manifest, parse_config
from engine.oci.mediatypes import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    Compression,
)
from engine.oci.platform import Platform
from engine.progress import Report, Step

__all__ = ["Imported", "import_images"]

_POLL_S = 0.05  # another process cannot tell us that it is done

_DOCKER_LAYERS = {
    Compression.NONE: DOCKER_LAYER,
    Compression.GZIP: f"{DOCKER_LAYER}.gzip",
    Compression.ZSTD: f"{DOCKER_LAYER}.zstd",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """An image whose content is in the store, and the names that its archive gives it."""

    names: tuple[str, ...]
    target: Descriptor
    image: ResolvedImage


def import_images(
    path: Path,
    content: ContentStore,
    *,
    platform: Platform,
    spool: Path,
    lease: str,
    report: Report,
) -> list[Imported]:
    """Store the images at `path` for one platform and return them.

    A compressed archive is unpacked to a file in `spool` first. Raises NotFound for a file or a
    platform that is not there, Refused for what is not an image or breaks a rule.
    """
    with open_source(path, spool, partial(report, Step.READ, path.name)) as source:
        images = find_images(source, path, platform)
        bring = _Import(source, content, platform, lease, report)
        return [
            bring.oci(image) if isinstance(image, OciImage) else bring.docker(image) for image in images
        ]


@dataclass(frozen=True, slots=True)
class _Import:
    source: Source
    content: ContentStore
    platform: Platform
    lease: str
    report: Report
    brought: dict[tuple[object, ...], ResolvedImage] = field(default_factory=dict)

    # -- OCI ----------------------------------------------------------------------------------

    def oci(self, found: OciImage) -> Imported:
        # An index may give one image 10,000 names: it is read once.
        key = (found.target.digest, found.target.media_type, found.target.size, found.chosen)
        image = self.brought.get(key)
        if image is None:
            image = self.brought[key] = self._bring(found)
        return Imported((found.name,), found.target, image)

    def _bring(self, found: OciImage) -> ResolvedImage:
        image = resolve(found.target, self.platform, self._document, chosen=found.chosen)
        for descriptor in (image.manifest.config, *image.manifest.layers):
            self._store(descriptor)
        # Parents after children, so that a label never names what is not there yet.
        self._store(image.path[-1], _manifest_labels(image.manifest))
        for above, below in zip(image.path[-2::-1], image.path[:0:-1], strict=True):
            # By digest, not by position: importing another platform later adds to these labels.
            key = f"{labels.GC_REF_CONTENT}.m.{below.digest[-12:]}"
            self._store(above, {key: below.digest})
        hit("import.labelled")
        return image

    def _document(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a manifest, index or config from the source, verified."""
        name = _blob_name(descriptor.key)
        if self.source.size(name) is None:
            return self._stored_document(descriptor, limit)
        data = read_small(self.source, name, limit)
        _check_size(descriptor, len(data))
        running = hasher(descriptor.key)
        running.update(data)
        if running.hexdigest() != descriptor.key.partition(":")[2]:
            actual = f"{running.name}:{running.hexdigest()}"
            raise DigestMismatch(f"file {name}", descriptor.key, actual)
        return data

    def _stored_document(self, descriptor: Descriptor, limit: int) -> bytes:
        try:
            data = self.content.read_all(descriptor.key, limit)
        except NotFound:
            raise _absent(descriptor) from None
        _check_size(descriptor, len(data))
        return data

    def _store(self, descriptor: Descriptor, about: labels.Labels | None = None) -> None:
        """Bring one blob in by its digest, or pin the one that is here."""
        digest = descriptor.key
        try:
            writer = self._ingest(f"import-{digest}", digest, descriptor.size)
        except AlreadyExists:
            _check_size(descriptor, self.content.info(digest).size)
            self._merge_labels(digest, about)
            return
        name = _blob_name(digest)
        size = self.source.size(name)
        with writer:
            if size is None:
                writer.abort()
                raise _absent(descriptor)
            if size != descriptor.size:
                writer.abort()
                _check_size(descriptor, size)
            self._copy(name, writer, descriptor.size, digest)
            writer.commit(about)

    def _merge_labels(self, digest: Digest, about: labels.Labels | None) -> None:
        if about:
            self.content.update(digest, about)

    def _copy(self, name: str, writer: Writer, size: int, item: Digest) -> None:
        show = partial(self.report, Step.STORE, item, size)
        show(writer.offset)
        for piece in _from_offset(self.source.read(name), writer.offset):
            writer.write(piece)
            show(writer.offset)

    def _ingest(self, ref: str, expected: Digest | None, size: int) -> Writer:
        """Open an ingest, after another import that has it open is done with it or dead."""
        waiting = ""
        try:
            while True:
                try:
                    return self.content.ingest(ref, lease=self.lease, expected=expected, total=size)
                except BeingWritten as error:
                    waiting = str(error)
                    self.report(Step.WAIT, waiting, size, 0)
                    time.sleep(_POLL_S)
        finally:
            if waiting:
                self.report(Step.WAIT, waiting, size, size)

    # -- docker -------------------------------------------------------------------------------

    def docker(self, found: DockerImage) -> Imported:
        data = read_small(self.source, found.config, limits.CONFIG)
        config = parse_config(data, len(found.layers), printable(found.config))
        layers = [
            self._docker_layer(name, diff_id)
            for name, diff_id in zip(found.layers, config.diff_ids, strict=True)
        ]
        manifest = Manifest(
            schema_version=2,
            media_type=DOCKER_MANIFEST,
            config=self._put(data, DOCKER_CONFIG, {}),
            layers=layers,
        )
        encoded = msgspec.json.encode(manifest)
        target = self._put(encoded, DOCKER_MANIFEST, _manifest_labels(manifest))
        hit("import.labelled")
        image = resolve(target, self.platform, self._stored_document)
        return Imported(tuple(found.names), target, image)

    def _docker_layer(self, name: str, diff_id: Digest) -> Descriptor:
        size = self.source.size(name)
        if size is None:
            raise NotFound(f"the archive has no layer {printable(name)!r}; it is incomplete")
        head = next(self.source.read(name), b"")[:10]
        packing = sniff(head)
        # An unpacked layer is named by its diff ID: one that is here need not be read at all.
        expected = diff_id if packing is Compression.NONE else None
        digest = expected
        try:
            # Without a digest to resume towards, only this import may go on with what it wrote: the
            # same tree packed by another tool has other bytes.
            ref = f"import-{expected or f'{self.lease}-{diff_id}'}"
            with self._ingest(ref, expected, size) as writer:
                self._copy(name, writer, size, diff_id)
                digest = parse_digest(writer.commit().digest)
        except AlreadyExists:
            pass
        return Descriptor(media_type=_DOCKER_LAYERS[packing], digest=str(digest), size=size)

    def _put(self, data: bytes, media_type: str, about: labels.Labels) -> Descriptor:
        digest = digest_of(data)
        ref = f"import-{digest}"
        try:
            with self._ingest(ref, digest, len(data)) as writer:
                for piece in _from_offset(iter((data,)), writer.offset):
                    writer.write(piece)
                writer.commit(about)
        except AlreadyExists:
            self._merge_labels(digest, about)
        return Descriptor(media_type=media_type, digest=digest, size=len(data))


def _blob_name(digest: Digest) -> str:
    return "blobs/" + digest.replace(":", "/")


def _absent(descriptor: Descriptor) -> NotFound:
    return NotFound(f"the image has no blob {descriptor.digest}; it is incomplete")


def _check_size(descriptor: Descriptor, actual: int) -> None:
    if descriptor.size != actual:
        raise Refused(
            f"blob {descriptor.digest} has {actual} bytes, its descriptor says {descriptor.size}"
        )


def _from_offset(pieces: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """Leave out the first `offset` bytes, which an earlier writer stored and hashed."""
    for piece in pieces:
        if offset < len(piece):
            yield piece[offset:]
        offset = max(0, offset - len(piece))


def _manifest_labels(manifest: Manifest) -> dict[str, str]:
    """Return the labels that keep what a manifest needs, under containerd's keys."""
    kept = {f"{labels.GC_REF_CONTENT}.config": manifest.config.digest}
    for position, layer in enumerate(manifest.layers):
        kept[f"{labels.GC_REF_CONTENT}.l.{position}"] = layer.digest
    return kept
