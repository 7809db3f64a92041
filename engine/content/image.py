"""From a descriptor to the one image it means on a platform: index, manifest, config, layers.

Sync. Documents are read from wherever the caller says (the store, an archive), so that an import and
an unpack choose by the same rules.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine import limits
from engine.errors import NotFound, Refused, printable
from engine.oci.digest import Digest
from engine.oci.documents import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    parse_config,
    parse_index,
    parse_manifest,
)
from engine.oci.identity import ChainID, chain_ids
from engine.oci.mediatypes import INDEXES, Compression, layer_compression
from engine.oci.platform import Platform, choose, matches, normalise

__all__ = ["Layer", "Read", "ResolvedImage", "resolve"]

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
    path = [target]
    while path[-1].media_type in INDEXES:
        if len(path) > limits.INDEX_DEPTH:
            raise Refused(f"index {target.digest} is nested over {limits.INDEX_DEPTH} levels")
        path.append(_choose(path[-1], platform, read))
    manifest_data = read(path[-1], limits.MANIFEST)
    manifest = parse_manifest(manifest_data, path[-1].media_type, f"manifest {path[-1].digest}")
    config_data = read(manifest.config, limits.CONFIG)
    config = parse_config(config_data, len(manifest.layers), f"config {manifest.config.digest}")
    image = ResolvedImage(tuple(path), manifest, config)
    _check_platform(image, platform, chosen=chosen or len(path) > 1)
    for layer in image.layers:
        layer.descriptor.key  # noqa: B018  checks the digest
    return image


def _choose(descriptor: Descriptor, platform: Platform, read: Read) -> Descriptor:
    index = _index(descriptor, read)
    # Attestations say unknown/unknown and never match.
    position = choose(platform, [entry.platform for entry in index.manifests])
    if position is None:
        offered = ", ".join(sorted({str(e.platform) for e in index.manifests if e.platform}))
        raise NotFound(
            f"the image has nothing for {platform}; it has {printable(offered) or 'no platforms'}"
        )
    return index.manifests[position]


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
