"""What images a source holds, whatever wrote it: an OCI layout, or docker's older form.

Sync. Told apart by content: `oci-layout` with `index.json`, else `manifest.json`. Today's `docker save`
writes both, and the OCI half wins because it is addressed by digest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from engine import limits
from engine.archive.source import Source
from engine.errors import NotFound, Refused, printable
from engine.labels import IMAGE_NAME, OCI_REF_NAME
from engine.oci.documents import Descriptor, decode_json, parse_index
from engine.oci.platform import Platform, choose

__all__ = ["DockerImage", "OciImage", "find_images", "read_small"]

_LAYOUT, _INDEX, _DOCKER = "oci-layout", "index.json", "manifest.json"
_DOCKER_LIMIT = 20 * limits.MIB  # one file for all images of an archive; as in containerd


@dataclass(frozen=True, slots=True)
class OciImage:
    """An entry of `index.json` and its name; `chosen` among several for its platform."""

    name: str
    target: Descriptor
    chosen: bool


@dataclass(frozen=True, slots=True)
class DockerImage:
    """An entry of `manifest.json`: file names of the config and the layers."""

    names: Sequence[str]
    config: str
    layers: Sequence[str]


class _DockerEntry(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: Annotated[list[str], msgspec.Meta(max_length=limits.LAYERS)]
    repo_tags: list[str] | None = None


def find_images(source: Source, path: Path, platform: Platform) -> list[OciImage] | list[DockerImage]:
    """Return the images of a source, for index entries of one name the best for `platform`."""
    if source.size(_INDEX) is not None and source.size(_LAYOUT) is not None:
        return _oci(source, path, platform)
    if source.size(_DOCKER) is not None:
        return _docker(source, path)
    raise Refused(
        f"{path} is not an image: it has neither {_LAYOUT} and {_INDEX} (OCI) "
        f"nor {_DOCKER} (docker save)"
    )


def read_small(source: Source, name: str, limit: int) -> bytes:
    """Return a file whole. Raises NotFound, and Refused over `limit` bytes."""
    size = source.size(name)
    if size is None:
        raise NotFound(f"the image has no file {printable(name)!r}; it is incomplete")
    if size > limit:
        raise Refused(f"{printable(name)} is over {limit} bytes")
    data = bytearray()
    for piece in source.read(name):
        data += piece
        if len(data) > limit:
            raise Refused(f"{printable(name)} is over {limit} bytes")
    return bytes(data)


def _oci(source: Source, path: Path, platform: Platform) -> list[OciImage]:
    layout = decode_json(read_small(source, _LAYOUT, limits.MANIFEST), _LAYOUT)
    if not isinstance(layout, dict) or layout.get("imageLayoutVersion") != "1.0.0":
        raise Refused(f"{_LAYOUT} names an unknown version of the layout")
    index = parse_index(read_small(source, _INDEX, limits.MANIFEST), what=_INDEX)
    if not index.manifests:
        raise Refused(f"{path} holds no image: {_INDEX} is empty")
    groups: dict[str, list[Descriptor]] = {}
    for descriptor in index.manifests:
        groups.setdefault(_name(descriptor, path), []).append(descriptor)
    images = []
    for name, entries in groups.items():
        position = 0 if len(entries) == 1 else choose(platform, [e.platform for e in entries])
        if position is None:
            raise NotFound(f"{path} has no single image for {platform} under the name {name}")
        images.append(OciImage(name, entries[position], chosen=len(entries) > 1))
    return images


def _name(descriptor: Descriptor, path: Path) -> str:
    named = descriptor.annotations.get(IMAGE_NAME) or descriptor.annotations.get(OCI_REF_NAME)
    if named and ("/" in named or ":" in named):
        return named
    return f"{_stem(path)}:{named}" if named else _stem(path)


def _stem(path: Path) -> str:
    """Return a name made of a file's: lower case, without endings, only what a name may hold."""
    stem = path.absolute().name.lower()
    while (short := re.sub(r"\.(tar|tgz|gz|zst|oci|docker)\Z", "", stem)) != stem:
        stem = short
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "image"


def _docker(source: Source, path: Path) -> list[DockerImage]:
    value = decode_json(read_small(source, _DOCKER, _DOCKER_LIMIT), _DOCKER, _DOCKER_LIMIT)
    try:
        entries = msgspec.convert(value, list[_DockerEntry], strict=True)
    except msgspec.ValidationError as error:
        raise Refused(f"{_DOCKER}: {printable(str(error))}") from None
    if not entries:
        raise Refused(f"{path} holds no image: {_DOCKER} is empty")
    if len(entries) > limits.INDEX_ENTRIES:
        raise Refused(f"{_DOCKER} lists over {limits.INDEX_ENTRIES} images")
    # Each image's is read, also one that a thousand share.
    if sum(source.size(entry.config) or 0 for entry in entries) > limits.ARCHIVE_CONFIGS:
        raise Refused(f"the configs of all images have over {limits.ARCHIVE_CONFIGS} bytes")
    return [DockerImage(e.repo_tags or [_stem(path)], e.config, e.layers) for e in entries]
