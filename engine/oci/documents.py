"""Manifests, indexes and configs, parsed strictly from untrusted JSON.

Pure. Strict means: UTF-8, no duplicate key, no key that differs from a known one only in case (Go's
decoder would take it), integers where integers belong, one kind of document at a time (CVE-2021-41190),
and an embedded media type that agrees with the descriptor's. Size, depth and what decoding will cost
are bounded.
"""

import json
import re
from itertools import islice
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from engine import limits
from engine.errors import Refused, printable
from engine.oci.digest import Digest, parse_digest
from engine.oci.mediatypes import CONFIGS, INDEXES, MANIFESTS, OCI_INDEX
from engine.oci.platform import Platform

__all__ = [
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "RootFS",
    "decode_json",
    "parse_config",
    "parse_index",
    "parse_manifest",
]

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a document says of a blob: its media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: _Size
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    platform: Platform | None = None

    @property
    def key(self) -> Digest:
        """The digest, checked."""
        return parse_digest(self.digest)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One image for one platform."""

    schema_version: int
    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A list of manifests, one per platform or name."""

    schema_version: int
    media_type: str = ""
    manifests: list[Descriptor]
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class RootFS(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The layers of an image by their uncompressed digests, bottom first."""

    type: str
    diff_ids: list[str] = msgspec.field(default_factory=list)


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of an image's config that an engine needs; the rest stays in the blob."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    created: str | None = None
    rootfs: RootFS

    @property
    def platform(self) -> Platform:
        """The platform that the config itself names."""
        return Platform(architecture=self.architecture, os=self.os, variant=self.variant)

    @property
    def diff_ids(self) -> list[Digest]:
        """The diff IDs, checked."""
        return [parse_digest(diff_id) for diff_id in self.rootfs.diff_ids]


_Document = TypeVar("_Document", bound=msgspec.Struct)


# What takes memory once decoded. A string may lack its end, so that it is passed over once only.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{:,]', re.DOTALL)


def _check_extent(data: bytes, what: str, limit: int) -> None:
    """Refuse what would cost much memory to decode, before it is."""
    if len(data) > limit:
        raise Refused(f"{what} is over {limit} bytes")
    # One character may make Python hold four bytes for each of a whole text.
    if len(data) > limits.JSON_WIDE and (not data.isascii() or b"\\u" in data):
        raise Refused(f"{what} is over {limits.JSON_WIDE} bytes and not plain ASCII")
    if next(islice(_TOKEN.finditer(data), limits.JSON_TOKENS, None), None):
        raise Refused(f"{what} has over {limits.JSON_TOKENS} strings, brackets, colons and commas")


def decode_json(data: bytes, what: str, limit: int = limits.MANIFEST) -> object:
    """Return the value of a JSON text, or raise Refused naming `what` is wrong with it."""
    _check_extent(data, what, limit)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found or not key.isprintable():
                raise Refused(f"{what} has a doubtful or repeated key {printable(key)!r}")
            found[key] = value
        return found

    def no_constant(text: str) -> NoReturn:
        raise Refused(f"{what} holds {text}, which is not JSON")

    try:
        text = data.decode("utf-8", "strict")
        del data  # a caller need not keep it either: up to 20 MiB
        value: object = json.loads(text, object_pairs_hook=members, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not valid JSON: {printable(str(error))}") from None
    _check_depth(value, what)
    return value


def _check_depth(value: object, what: str) -> None:
    layer: list[Any] = [value]
    for _ in range(limits.JSON_DEPTH):
        below: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not (item.isascii() or _is_unicode(item)):
                raise Refused(f"{what} holds half of a surrogate pair")
        layer = below
        if not layer:
            return
    raise Refused(f"{what} is nested over {limits.JSON_DEPTH} levels")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _convert(value: object, kind: type[_Document], what: str) -> _Document:
    if not isinstance(value, dict):
        raise Refused(f"{what} is not a JSON object")
    _refuse_case_variants(value, kind, what)
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"{what}: {printable(str(error))}") from None


_KNOWN = frozenset(
    field.encode_name
    for kind in (Descriptor, Manifest, Index, RootFS, ImageConfig, Platform)
    for field in msgspec.structs.fields(kind)
) | {"fsLayers", "subject", "urls", "data", "artifactType"}
_FOLDED = {name.lower(): name for name in _KNOWN}


def _refuse_case_variants(value: object, kind: type[msgspec.Struct], what: str) -> None:
    """Refuse `Layers` where Go's decoder would read `layers`.

    Not in annotations, nor in a config outside of what is read: those keys are anybody's.
    """
    is_config = kind is ImageConfig
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            for key, child in item.items():
                if _FOLDED.get(key.lower(), key) != key:
                    raise Refused(f"{what} has the key {printable(key)!r} in another case")
                if key == "rootfs" if is_config else key != "annotations":
                    pending.append(child)


def _parse(
    data: bytes, kind: type[_Document], media_type: str, foreign: set[str], what: str
) -> _Document:
    value = decode_json(data, what)
    if isinstance(value, dict):
        if foreign & value.keys():
            raise Refused(f"{what} mixes kinds of documents: {sorted(foreign & value.keys())}")
        embedded = value.get("mediaType") or media_type
        if embedded != media_type:
            raise Refused(
                f"{what} says it is {printable(str(embedded))!r}, its descriptor says "
                f"{printable(media_type)!r}"
            )
    document = _convert(value, kind, what)
    if getattr(document, "schema_version", 2) != 2:
        raise Refused(f"{what} has an unknown schema version")
    return document


def parse_manifest(data: bytes, media_type: str, what: str = "manifest") -> Manifest:
    """Return the manifest in `data`, whose descriptor promised `media_type`."""
    if media_type not in MANIFESTS:
        raise Refused(f"{what}: {printable(media_type)!r} is not a manifest type that lamina knows")
    manifest = _parse(data, Manifest, media_type, {"manifests", "fsLayers"}, what)
    if len(manifest.layers) > limits.LAYERS:
        raise Refused(f"{what} has over {limits.LAYERS} layers")
    if manifest.config.media_type not in CONFIGS:
        raise Refused(
            f"{what} is not a container image: its config is {printable(manifest.config.media_type)!r}"
        )
    for descriptor in (manifest.config, *manifest.layers):
        parse_digest(descriptor.digest)
    return manifest


def parse_index(data: bytes, media_type: str = OCI_INDEX, what: str = "index") -> Index:
    """Return the index in `data`, whose descriptor promised `media_type`."""
    if media_type not in INDEXES:
        raise Refused(f"{what}: {printable(media_type)!r} is not an index type that lamina knows")
    index = _parse(data, Index, media_type, {"layers", "config", "fsLayers"}, what)
    if len(index.manifests) > limits.INDEX_ENTRIES:
        raise Refused(f"{what} lists over {limits.INDEX_ENTRIES} manifests")
    for descriptor in index.manifests:
        parse_digest(descriptor.digest)
    return index


def parse_config(data: bytes, layers: int, what: str = "config") -> ImageConfig:
    """Return the config in `data` of an image whose manifest has `layers` layers."""
    if len(data) > limits.CONFIG:
        raise Refused(f"{what} is over {limits.CONFIG} bytes")
    config = _convert(decode_json(data, what, limits.CONFIG), ImageConfig, what)
    if config.rootfs.type != "layers":
        raise Refused(f"{what}: unknown rootfs type {printable(config.rootfs.type)!r}")
    if len(config.diff_ids) != layers:
        raise Refused(f"{what} names {len(config.diff_ids)} diff IDs, its manifest {layers} layers")
    return config
