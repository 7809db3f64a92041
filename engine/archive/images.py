"""An image of a source in two steps: its documents are read, then its blobs are brought in.

Sync. Names in an archive only find files, digests decide what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from engine import limits
from engine.archive.contents import Candidate, DockerFiles
from engine.archive.intake import Absent, Intake
from engine.content.image import ResolvedImage, resolve
from engine.content.ingests import ref_of
from engine.content.keeping import kept_documents, manifest_labels
from engine.diff.decompress import SNIFFED, sniff
from engine.errors import AlreadyExists, Refused, printable
from engine.failpoints import hit
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor, Manifest, parse_config
from engine.oci.mediatypes import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, Compression
from engine.oci.platform import Platform

__all__ = ["Planned", "plan"]

_DOCKER_LAYERS = {
    Compression.NONE: DOCKER_LAYER,
    Compression.GZIP: f"{DOCKER_LAYER}.gzip",
    Compression.ZSTD: f"{DOCKER_LAYER}.zstd",
}


_Store = Callable[[], tuple[Descriptor, ResolvedImage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """An image whose documents are in order and whose blobs are all there, none of them stored yet.

    `target` is not known yet of an image in docker's form with packed layers: it names their digests.
    """

    listed: Candidate
    target: Descriptor | None
    layers: int
    store: _Store
    names: tuple[str, ...] = ()
    """In full; none for an image that will be called by its digest."""


def plan(listed: Candidate, intake: Intake, platform: Platform) -> Planned:
    """Read what an image consists of.

    Raises Refused for what is wrong or missing (`NotAnImage` for what is none), NotFound if there is
    nothing for the platform.
    """
    if isinstance(listed.what, Descriptor):
        return _plan_oci(listed, listed.what, intake, platform)
    return _plan_docker(listed, listed.what, intake, platform)


# -- OCI --------------------------------------------------------------------------------------


def _plan_oci(listed: Candidate, target: Descriptor, intake: Intake, platform: Platform) -> Planned:
    try:
        image = resolve(target, platform, intake.document, chosen=listed.chosen)
    except Absent as error:
        raise Refused(str(error)) from None
    for layer in image.manifest.layers:
        intake.check(layer)
    return Planned(
        listed=listed,
        target=target,
        layers=len(image.manifest.layers),
        store=partial(_store_oci, image, intake),
    )


def _store_oci(image: ResolvedImage, intake: Intake) -> tuple[Descriptor, ResolvedImage]:
    intake.store(image.manifest.config)
    for layer in image.manifest.layers:
        intake.plan(layer.key, layer.size)
    with intake.follower.following(image):
        for layer in image.manifest.layers:
            intake.store(layer)
    for document, about in kept_documents(image.path, image.manifest):
        intake.store(document, about)
    hit("import.labelled")
    return image.path[0], image


# -- docker -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _DockerLayer:
    """A layer's file in a docker archive; named by its diff ID if it is not packed."""

    name: str
    size: int
    diff_id: Digest
    packing: Compression

    def descriptor(self, digest: str) -> Descriptor:
        return Descriptor(media_type=_DOCKER_LAYERS[self.packing], digest=digest, size=self.size)


def _plan_docker(listed: Candidate, files: DockerFiles, intake: Intake, platform: Platform) -> Planned:
    data = intake.small(files.config, limits.CONFIG)
    if len(files.layers) > limits.LAYERS:
        raise Refused(f"it has over {limits.LAYERS} layers")
    config = parse_config(data, len(files.layers), printable(files.config))
    layers = [
        _docker_layer(name, diff_id, intake)
        for name, diff_id in zip(files.layers, config.diff_ids, strict=True)
    ]
    store: _Store
    if all(layer.packing is Compression.NONE for layer in layers):
        image = _foretold(data, layers, platform)
        target = image.path[0]
        store = partial(_store_foretold, data, layers, image, intake)
    else:
        target = None
        store = partial(_store_docker, data, layers, platform, intake)
    return Planned(listed=listed, target=target, layers=len(layers), store=store)


def _foretold(config: bytes, layers: list[_DockerLayer], platform: Platform) -> ResolvedImage:
    """Return what an image will be whose layers are not packed: their diff IDs are their digests."""
    manifest = _manifest(config, [layer.descriptor(layer.diff_id) for layer in layers])
    encoded = msgspec.json.encode(manifest)
    target = _described(encoded, DOCKER_MANIFEST)
    documents = {target.key: encoded, manifest.config.key: config}
    return resolve(target, platform, lambda descriptor, _limit: documents[descriptor.key])


def _docker_layer(name: str, diff_id: Digest, intake: Intake) -> _DockerLayer:
    size = intake.source.size(name)
    if size is None:
        raise Refused(f"layer {printable(name)!r} is missing; the image is incomplete, copy it again")
    packing = sniff(next(intake.source.read(name, SNIFFED), b""))
    return _DockerLayer(name, size, diff_id, packing)


def _manifest(config: bytes, layers: list[Descriptor]) -> Manifest:
    described = _described(config, DOCKER_CONFIG)
    return Manifest(schema_version=2, media_type=DOCKER_MANIFEST, config=described, layers=layers)


def _described(data: bytes, media_type: str) -> Descriptor:
    return Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))


def _store_foretold(
    config: bytes, layers: list[_DockerLayer], image: ResolvedImage, intake: Intake
) -> tuple[Descriptor, ResolvedImage]:
    intake.put(config, DOCKER_CONFIG, {})
    for layer in layers:
        intake.plan(layer.diff_id, layer.size)
    with intake.follower.following(image):
        for layer in layers:
            _store_layer(layer, intake)
    return _store_manifest(image.manifest, intake), image


def _store_docker(
    config: bytes, layers: list[_DockerLayer], platform: Platform, intake: Intake
) -> tuple[Descriptor, ResolvedImage]:
    for layer in layers:
        intake.plan(layer.diff_id, layer.size)
    manifest = _manifest(config, [_store_layer(layer, intake) for layer in layers])
    intake.put(config, DOCKER_CONFIG, {})
    target = _store_manifest(manifest, intake)
    return target, resolve(target, platform, intake.stored)


def _store_manifest(manifest: Manifest, intake: Intake) -> Descriptor:
    encoded = msgspec.json.encode(manifest)
    target = intake.put(encoded, DOCKER_MANIFEST, manifest_labels(manifest))
    hit("import.labelled")
    return target


def _store_layer(layer: _DockerLayer, intake: Intake) -> Descriptor:
    # A layer that is not packed is named by its diff ID: one that is here need not be read at all.
    expected = layer.diff_id if layer.packing is Compression.NONE else None
    # Without a digest to resume towards, only this import may go on with what it wrote: the
    # same tree packed by another tool has other bytes.
    ref = ref_of(expected or f"{intake.lease}-{layer.diff_id}")
    try:
        with intake.begin(ref, expected, layer.size) as writer:
            intake.copy(layer.name, writer, layer.size, layer.diff_id)
            blob = intake.kept(layer.diff_id, writer.commit())
    except AlreadyExists:
        blob = intake.found(layer.diff_id)
    if expected:
        intake.follower.come(expected, blob)
    return layer.descriptor(blob.digest)
