"""From a descriptor to the one image it means on a platform: index, manifest, config, layers.

Sync. Documents are read from wherever the caller says (the store, an archive), so that an import and
an unpack choose by the same rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine import limits
from engine.errors import NotFound, Refused, printable
from engine.oci.digest import Digest
from engine.oci.documents import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    check_manifest_type,
    parse_config,
    parse_index,
    parse_manifest,
)
from engine.oci.identity import ChainID, chain_ids
from engine.oci.mediatypes import CONFIGS, INDEXES, MANIFESTS, Compression, layer_compression
from engine.oci.platform import Platform, choose, matches, normalise

__all__ = ["Layer", "Read", "ResolvedImage", "is_attestation", "may_be_image", "resolve"]

_ATTESTATION = "vnd.docker.reference.type"  # annotation of buildkit's, beside the images of an index

Read = Callable[[Descriptor, int], bytes]
"""Return a small blob, verified: at most that many bytes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of an image: its blob, what is in it, and how it is packed."""

    descriptor: Descriptor
    diff_id: Digest
    compression: Compression


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """One image for one platform; `path` is how it was reached, the named descriptor first."""

    path: tuple[Descriptor, ...]
    manifest: Manifest
    config: ImageConfig

    @property
    def layers(self) -> list[Layer]:
        """The layers, bottom first."""
        return [
            Layer(descriptor, diff_id, layer_compression(descriptor.media_type))
            for descriptor, diff_id in zip(self.manifest.layers, self.config.diff_ids, strict=True)
        ]

    @property
    def chain(self) -> list[ChainID]:
        """The chain IDs of the layers, bottom first."""
        return chain_ids(self.config.diff_ids)


def resolve(
    target: Descriptor, platform: Platform, read: Read, *, chosen: bool = False
) -> ResolvedImage:
    """Return the image that `target` means on `platform`.

    `chosen` says that the caller chose `target` for the platform, which its config must bear out.
    Raises NotFound if there is none for the platform, Refused for documents that break a rule.
    """
    path: tuple[Descriptor, ...] = (target,)
    while path[-1].media_type in INDEXES:
        if len(path) > limits.INDEX_DEPTH:
            raise _too_deep(target)
        path += _choose(path[-1], platform, read)
    what = f"manifest {path[-1].digest}"
    check_manifest_type(path[-1].media_type, what)  # what is none may well be large, or not be here
    manifest = parse_manifest(read(path[-1], limits.MANIFEST), path[-1].media_type, what)
    config_data = read(manifest.config, limits.CONFIG)
    config = parse_config(config_data, len(manifest.layers), f"config {manifest.config.digest}")
    image = ResolvedImage(path, manifest, config)
    _check_platform(image, platform, chosen=chosen or len(path) > 1)
    for layer in image.layers:
        layer.descriptor.key  # noqa: B018  checks the digest
    return image


def may_be_image(entry: Descriptor) -> bool:
    """Say whether an entry of an index may be chosen; attestations and artifacts never are."""
    return (
        entry.media_type in MANIFESTS | INDEXES
        and (not entry.artifact_type or entry.artifact_type in CONFIGS)
        and not is_attestation(entry)
    )


def is_attestation(entry: Descriptor) -> bool:
    """Say whether an entry of an index only tells of another: how it was built, what is in it."""
    platform = entry.platform
    unknown = platform is not None and platform.os == platform.architecture == "unknown"
    return unknown or _ATTESTATION in entry.annotations


def _choose(index: Descriptor, platform: Platform, read: Read) -> tuple[Descriptor, ...]:
    """Return the way from an index to what it has for a platform, the index itself left out."""
    ways = _ways(index, read)
    position = choose(platform, [way[-1].platform for way in ways])
    if position is None:
        offered = ", ".join(sorted({str(way[-1].platform) for way in ways if way[-1].platform}))
        raise NotFound(
            f"the image has nothing for {platform}; it has {printable(offered) or 'no platforms'}"
        )
    return ways[position]


def _ways(top: Descriptor, read: Read) -> Sequence[tuple[Descriptor, ...]]:
    """Return the ways to what an index lists, through indexes in it that name no platform.

    Each index is read once, however often it is listed.
    """
    ways: list[tuple[Descriptor, ...]] = []
    seen: set[str] = set()  # of those without a platform: one that is listed twice counts once
    listed = looked_through = 0
    pending: list[tuple[Descriptor, ...]] = [()]
    while pending:
        way = pending.pop()
        if way and (way[-1].media_type not in INDEXES or way[-1].platform):
            ways.append(way)
            continue
        if len(way) >= limits.INDEX_DEPTH:
            raise _too_deep(top)
        entries = [entry for entry in _entries(way, top, read) if may_be_image(entry)]
        listed += len(entries)
        looked_through += 1
        if listed > limits.INDEX_ENTRIES or looked_through > limits.INDEXES:
            raise Refused(
                f"index {top.digest} leads to over {limits.INDEX_ENTRIES} manifests "
                f"or {limits.INDEXES} indexes"
            )
        below: list[tuple[Descriptor, ...]] = []
        for entry in entries:
            if entry.platform or entry.digest not in seen:
                below.append((*way, entry))
            if not entry.platform:
                seen.add(entry.digest)
        pending += reversed(below)  # so that the first listed is the next to be looked at
    return ways


def _entries(way: Sequence[Descriptor], top: Descriptor, read: Read) -> Sequence[Descriptor]:
    try:
        return _index(way[-1] if way else top, read).manifests
    except NotFound:
        if not way:
            raise
        # An import stores the way to what it chose: what else the index leads to is not here.
        return ()


def _too_deep(top: Descriptor) -> Refused:
    return Refused(f"index {top.digest} is nested over {limits.INDEX_DEPTH} levels")


def _index(descriptor: Descriptor, read: Read) -> Index:
    data = read(descriptor, limits.MANIFEST)
    return parse_index(data, descriptor.media_type, f"index {descriptor.digest}")


def _check_platform(image: ResolvedImage, platform: Platform, *, chosen: bool) -> None:
    """Refuse an image whose own config is for another platform than its index promised."""
    own = image.config.platform
    if chosen and own.architecture and not matches(normalise(platform), normalise(own)):
        raise Refused(
            f"manifest {image.path[-1].digest} is listed for {platform}, "
            f"its config says {printable(str(own))}"
        )
