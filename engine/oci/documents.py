"""Manifests, indexes and configs, parsed strictly from untrusted JSON.

Pure. Strict means: UTF-8, no duplicate key, no key that differs only in case from one that is read there
(Go's decoder would take it), integers where integers belong, one kind of document at a time
(CVE-2021-41190), and an embedded media type that agrees with the descriptor's. Size, depth and what
decoding will cost are bounded. Null is an absent value, as Go's encoder writes it.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from itertools import islice
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import msgspec

from engine import limits
from engine.errors import Refused, printable
from engine.oci.digest import Digest, parse_digest
from engine.oci.mediatypes import CONFIGS, INDEXES, MANIFESTS, OCI_INDEX, is_layer
from engine.oci.platform import Platform

__all__ = [
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "NotAnImage",
    "RootFS",
    "check_manifest_type",
    "convert",
    "decode_json",
    "parse_artifact",
    "parse_config",
    "parse_index",
    "parse_manifest",
]


class NotAnImage(Refused):
    """A document is in order, but what it describes is no container image."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} is not a container image: {reason}")
        self.reason = reason


_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a document says of a blob: its media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: _Size
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""

    @property
    def key(self) -> Digest:
        """The digest, checked."""
        return parse_digest(self.digest)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One image for one platform."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    subject: Descriptor | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A list of manifests, one per platform or name."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    manifests: list[Descriptor]
    subject: Descriptor | None = None
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


def convert(value: object, kind: type[_Document], what: str, foreign: Collection[str] = ()) -> _Document:
    """Return a JSON object as a document; Refused for one that is not of that kind.

    `foreign` are keys of other kinds of documents, which this one may not have.
    """
    if not isinstance(value, dict):
        raise Refused(f"{what} is not a JSON object")
    mixed = sorted(key for key in foreign if value.get(key) is not None)
    if mixed:
        raise Refused(f"{what} mixes kinds of documents: {mixed}")
    try:
        return msgspec.convert(_read(value, kind, what, foreign), kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"{what}: {printable(str(error))}") from None


class _Member(NamedTuple):
    """What is known of a key: the kind of the object below it, or of those in its list."""

    name: str
    below: type[msgspec.Struct] | None
    is_list: bool


_ONLY_SHOWN = frozenset({"created"})  # decides nothing, and old docker wrote `Created` as well


@cache
def _members(kind: type[msgspec.Struct]) -> Mapping[str, _Member]:
    """Return the keys that are read of an object, folded as Go's decoder folds them."""
    return {
        field.encode_name.casefold(): _Member(
            field.encode_name, _struct_in(field.type), get_origin(field.type) is list
        )
        for field in msgspec.structs.fields(kind)
    }


def _struct_in(annotation: object) -> type[msgspec.Struct] | None:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    return next(filter(None, map(_struct_in, get_args(annotation))), None)


def _read(
    value: dict[str, Any], kind: type[msgspec.Struct], what: str, foreign: Collection[str] = ()
) -> dict[str, Any]:
    """Return the members of an object that are read, without those that are null.

    `Layers` is refused where Go's decoder would read `layers`; elsewhere a key is anybody's.
    """
    known = _members(kind)
    others = {key.casefold() for key in foreign}
    found: dict[str, Any] = {}
    for key, child in value.items():
        folded = key.casefold()
        member = known.get(folded)
        if member and member.name == key:
            found[key] = _present(child, member, what)
        elif (member and folded not in _ONLY_SHOWN) or (folded in others and key not in foreign):
            raise Refused(f"{what} has the key {printable(key)!r} in another case")
    return {key: child for key, child in found.items() if child is not None}


def _present(child: Any, member: _Member, what: str) -> Any:  # noqa: ANN401  any JSON
    """Return a value as Go reads it: null in place of a list is an empty one."""
    if child is None:
        return [] if member.is_list else None
    if isinstance(child, dict):
        if member.below:
            return _read(child, member.below, what)
        return {key: text for key, text in child.items() if text is not None}
    if isinstance(child, list) and member.below:
        kind = member.below
        return [_read(item, kind, what) if isinstance(item, dict) else item for item in child]
    return child


def _parse(
    data: bytes, kind: type[_Document], media_type: str, foreign: set[str], what: str
) -> _Document:
    value = decode_json(data, what)
    if isinstance(value, dict):
        embedded = value.get("mediaType") or media_type
        if embedded != media_type:
            raise Refused(
                f"{what} says it is {printable(str(embedded))!r}, its descriptor says "
                f"{printable(media_type)!r}"
            )
    document = convert(value, kind, what, foreign)
    if getattr(document, "schema_version", 2) != 2:
        raise Refused(f"{what} has an unknown schema version")
    return document


def check_manifest_type(media_type: str, what: str) -> None:
    """Raise NotAnImage for a media type that no image has."""
    if media_type not in MANIFESTS:
        raise NotAnImage(what, f"its media type is {printable(media_type)!r}")


def parse_artifact(data: bytes, media_type: str, what: str) -> Manifest:
    """Return a manifest, be it an image's or that of anything else that is kept as one."""
    manifest = _parse(data, Manifest, media_type, {"manifests", "fsLayers"}, what)
    if len(manifest.layers) > limits.LAYERS:
        raise Refused(f"{what} has over {limits.LAYERS} layers")
    return manifest


def parse_manifest(data: bytes, media_type: str, what: str = "manifest") -> Manifest:
    """Return the manifest in `data`, whose descriptor promised `media_type`."""
    check_manifest_type(media_type, what)
    manifest = parse_artifact(data, media_type, what)
    if manifest.config.media_type not in CONFIGS:
        kind, said = ("config", manifest.config.media_type)
        if manifest.artifact_type:
            kind, said = ("type", manifest.artifact_type)
        raise NotAnImage(what, f"its {kind} is {printable(said)!r}")
    if manifest.layers and not any(is_layer(layer.media_type) for layer in manifest.layers):
        # A signature of cosign or an attestation of buildkit has a config as an image has.
        raise NotAnImage(what, f"its layers are {printable(manifest.layers[0].media_type)!r}")
    for descriptor in (manifest.config, *manifest.layers):
        parse_digest(descriptor.digest)
    return manifest


def parse_index(data: bytes, media_type: str = OCI_INDEX, what: str = "index") -> Index:
    """Return the index in `data`, whose descriptor promised `media_type`.

    The digests of its entries are checked where they are used: beside an image may stand anything.
    """
    if media_type not in INDEXES:
        raise Refused(f"{what}: {printable(media_type)!r} is not an index type that lamina knows")
    index = _parse(data, Index, media_type, {"layers", "config", "fsLayers"}, what)
    if len(index.manifests) > limits.INDEX_ENTRIES:
        raise Refused(f"{what} lists over {limits.INDEX_ENTRIES} manifests")
    return index


def parse_config(data: bytes, layers: int, what: str = "config") -> ImageConfig:
    """Return the config in `data` of an image whose manifest has `layers` layers."""
    if len(data) > limits.CONFIG:
        raise Refused(f"{what} is over {limits.CONFIG} bytes")
    config = convert(decode_json(data, what, limits.CONFIG), ImageConfig, what)
    if config.rootfs.type != "layers":
        raise Refused(f"{what}: unknown rootfs type {printable(config.rootfs.type)!r}")
    if len(config.diff_ids) != layers:
        raise Refused(f"{what} names {len(config.diff_ids)} diff IDs, its manifest {layers} layers")
    return config
