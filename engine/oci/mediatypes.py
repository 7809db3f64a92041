"""Media types of OCI and docker images, and what each says about compression.

Pure. Sources: OCI image spec media-types.md; docker's image manifest v2 schema 2.
"""

from enum import StrEnum

from engine.errors import Refused, printable

__all__ = [
    "CONFIGS",
    "DOCKER_CONFIG",
    "DOCKER_LAYER",
    "DOCKER_MANIFEST",
    "INDEXES",
    "MANIFESTS",
    "OCI_INDEX",
    "OCI_MANIFEST",
    "Compression",
    "is_distributable",
    "is_layer",
    "layer_compression",
]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

INDEXES = frozenset({OCI_INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({"application/vnd.oci.image.config.v1+json", DOCKER_CONFIG})


class Compression(StrEnum):
    """How a layer's bytes are packed; ANY means that only the bytes can tell."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    ANY = "any"


_LAYERS = {
    "application/vnd.oci.image.layer.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.oci.image.layer.nondistributable.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": Compression.ZSTD,
    # Docker's plain type says nothing: `docker save` and old pushes put gzip under it too.
    DOCKER_LAYER: Compression.ANY,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Compression.GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": Compression.GZIP,
}


_LAYER_KINDS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


def is_layer(media_type: str) -> bool:
    """Say whether a media type is that of an image's layer, be it one that cannot be read here."""
    return media_type.startswith(_LAYER_KINDS)


def is_distributable(media_type: str) -> bool:
    """Say whether a registry may be given a layer of this type; else its owner gives it out."""
    return "nondistributable" not in media_type and ".foreign." not in media_type


def layer_compression(media_type: str) -> Compression:
    """Return the compression that a layer's media type promises; Refused if it is no layer."""
    try:
        return _LAYERS[media_type]
    except KeyError:
        raise Refused(f"not a layer type that lamina knows: {printable(media_type)!r}") from None
