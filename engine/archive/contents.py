"""What images a source lists, whatever wrote it: an OCI layout, `docker save`, or skopeo's `dir:`.

Sync. Told apart by content: `oci-layout` with `index.json`; else `version` with one image's
`manifest.json`; else a `manifest.json` that lists images. Today's `docker save` writes the first and the
last, and the OCI half wins because it is addressed by digest.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from engine import limits
from engine.archive.source import Source
from engine.content.growing import BATCH
from engine.errors import Refused, printable
from engine.labels import IMAGE_NAME, OCI_REF_NAME
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor, convert, decode_json, parse_index
from engine.oci.mediatypes import OCI_INDEX, OCI_MANIFEST

__all__ = ["Candidate", "Contents", "DockerFiles", "Name", "blob_name", "find_images", "read_small"]

_LAYOUT, _INDEX, _DOCKER, _VERSION = "oci-layout", "index.json", "manifest.json", "version"
_DIR = "Directory Transport Version: 1."  # containers/image, directory/directory_dest.go
_IMAGE_ID = re.compile(r"(?:\A|[/:])([0-9a-f]{64})(?:\.json)?\Z")


class Name(NamedTuple):
    """A name that a source gives an image: as it is written there, and the reference that it means."""

    written: str
    reference: str


@dataclass(frozen=True, slots=True)
class DockerFiles:
    """The names of an image's files in a docker archive."""

    config: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image as a source lists it.

    Its digest is that of its manifest or index, for docker of its config, as far as the source tells.
    `chosen` says that it was chosen among several for its platform.
    """

    names: tuple[Name, ...]
    digest: str
    what: Descriptor | DockerFiles
    chosen: bool = False

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return printable(self.names[0].reference if self.names else self.digest) or "without a name"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a source lists, and its files as they are named in an OCI layout."""

    files: Source
    images: Sequence[Candidate]


class _DockerEntry(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] = msgspec.field(default_factory=list)


def find_images(files: Source, where: str, stem: str) -> Contents:
    """Return what the source `where` lists; `stem` is the name for tags without one."""
    if files.size(_INDEX) is not None and files.size(_LAYOUT) is not None:
        return Contents(files, _oci(files, where, stem))
    if files.size(_DOCKER) is None:
        raise Refused(
            f"{where} is not an image: it has neither {_LAYOUT} and {_INDEX} (OCI) "
            f"nor {_DOCKER} (docker save, skopeo's dir:)"
        )
    if files.size(_VERSION) is not None:
        return _dir(files)
    return Contents(files, _docker(files, where))


def blob_name(digest: Digest) -> str:
    """Return the name of a blob's file in an OCI layout."""
    return "blobs/" + digest.replace(":", "/")


def read_small(source: Source, name: str, limit: int) -> bytes:
    """Return a file whole. Raises Refused if there is none, and over `limit` bytes."""
    data = bytearray()
    # Its size is asked first: a file may be huge, and each piece is read at once.
    if (source.size(name) or 0) <= limit:
        for piece in source.read(name):
            data += piece
            if len(data) > limit:
                break
        else:
            return bytes(data)
    raise Refused(f"{printable(name)} is over {limit} bytes")


# -- OCI layouts ------------------------------------------------------------------------------


def _oci(files: Source, where: str, stem: str) -> list[Candidate]:
    layout = decode_json(read_small(files, _LAYOUT, limits.MANIFEST), _LAYOUT)
    if not isinstance(layout, dict) or layout.get("imageLayoutVersion") != "1.0.0":
        raise Refused(f"{_LAYOUT} names an unknown version of the layout")
    index = parse_index(read_small(files, _INDEX, limits.MANIFEST), what=_INDEX)
    if not index.manifests:
        raise Refused(f"{where} holds no image: {_INDEX} is empty")
    return [Candidate(_names(entry, stem), entry.digest, entry) for entry in index.manifests]


def _names(entry: Descriptor, stem: str) -> tuple[Name, ...]:
    written = entry.annotations.get(IMAGE_NAME) or entry.annotations.get(OCI_REF_NAME)
    if not written:
        return ()
    is_whole = "/" in written or ":" in written
    return (Name(written, written if is_whole else f"{stem or 'image'}:{written}"),)


# -- docker archives --------------------------------------------------------------------------


def _docker(files: Source, where: str) -> list[Candidate]:
    value = decode_json(read_small(files, _DOCKER, limits.ARCHIVE_LIST), _DOCKER, limits.ARCHIVE_LIST)
    if not isinstance(value, list):
        raise Refused(f"{_DOCKER} is not a list of images")
    if not value:
        raise Refused(f"{where} holds no image: {_DOCKER} is empty")
    if len(value) > limits.INDEX_ENTRIES:
        raise Refused(f"{_DOCKER} lists over {limits.INDEX_ENTRIES} images")
    entries = [convert(entry, _DockerEntry, _DOCKER) for entry in value]
    return [
        Candidate(
            tuple(Name(tag, tag) for tag in entry.repo_tags),
            _image_id(entry.config),
            DockerFiles(entry.config, tuple(entry.layers)),
        )
        for entry in entries
    ]


def _image_id(config: str) -> str:
    match = _IMAGE_ID.search(config)
    return f"sha256:{match[1]}" if match else ""


# -- skopeo's dir: ----------------------------------------------------------------------------


def _dir(files: Source) -> Contents:
    version = read_small(files, _VERSION, limits.MANIFEST)
    if not version.startswith(_DIR.encode()):
        raise Refused(f"{_VERSION} is not that of a folder of skopeo's: {printable(version)!r}")
    data = read_small(files, _DOCKER, limits.MANIFEST)
    value = decode_json(data, _DOCKER)
    if not isinstance(value, dict):
        raise Refused(f"{_DOCKER} is not a manifest")
    # Of OCI documents only: docker's always say what they are.
    media_type = value.get("mediaType") or (OCI_INDEX if value.get("manifests") else OCI_MANIFEST)
    target = Descriptor(media_type=str(media_type), digest=digest_of(data), size=len(data))
    return Contents(_DirFiles(files, blob_name(target.key)), [Candidate((), target.digest, target)])


@dataclass(frozen=True, slots=True)
class _DirFiles:
    """The files of a `dir:` under their names in an OCI layout; `top` is its `manifest.json`."""

    files: Source
    top: str

    def size(self, name: str) -> int | None:
        """Return the size of a file."""
        return self.files.size(self._place(name))

    def read(self, name: str, piece: int = BATCH) -> Iterator[bytes]:
        """Yield a file's bytes."""
        return self.files.read(self._place(name), piece)

    def _place(self, name: str) -> str:
        if name == self.top:
            return _DOCKER
        # containers/image, directory/directory_transport.go: layerPath and manifestPath.
        digits = name.rpartition("/")[2]
        manifest = f"{digits}.manifest.json"
        return manifest if self.files.size(manifest) is not None else digits
