"""What the layers of an image hold: the bytes and entries that any tool has to make of them."""

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from typing import BinaryIO, cast

import zstandard
from isal import igzip

from benchmarks.cores import results
from benchmarks.images import Image, Layer
from engine.oci.mediatypes import Compression

__all__ = ["Contents", "Entry", "inflated", "read_contents"]

_FEED = 1 << 18
_PREFIX = "SCHILY.xattr."


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a layer."""

    path: str
    kind: bytes
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    size: int
    link: str
    xattrs: Sequence[tuple[str, bytes]]

    @property
    def is_folder(self) -> bool:
        """Whether other names may be below it."""
        return self.kind == tarfile.DIRTYPE


@dataclass(frozen=True)
class Unpacked:
    """A layer: the bytes of its archive, and its entries, of each name the last."""

    size: int
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Contents:
    """An image, unpacked."""

    layers: Sequence[Unpacked]

    @property
    def entries(self) -> int:
        """How many entries there are in all layers."""
        return sum(len(layer.entries) for layer in self.layers)

    @property
    def size(self) -> int:
        """How many bytes of files there are in all layers."""
        return sum(entry.size for layer in self.layers for entry in layer.entries)


@contextmanager
def inflated(layer: Layer) -> Iterator[BinaryIO]:
    """Open the archive that a layer's blob unpacks to."""
    with layer.path.open("rb") as blob:
        if layer.compression is Compression.GZIP:
            with igzip.open(blob) as archive:
                yield cast("BinaryIO", archive)
        elif layer.compression is Compression.ZSTD:
            with zstandard.ZstdDecompressor().stream_reader(blob, read_size=_FEED) as archive:
                yield cast("BinaryIO", archive)
        else:
            yield blob


class _Counted(RawIOBase):
    """A file that knows how much was read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.count, self._file = 0, file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.count += len(data)
        return data


def read_contents(image: Image) -> Contents:
    """Read all headers of an image's layers."""
    return Contents(results([partial(_read, layer) for layer in image.layers]))


def _read(layer: Layer) -> Unpacked:
    entries: dict[str, Entry] = {}
    with inflated(layer) as archive:
        counted = _Counted(archive)
        with tarfile.open(fileobj=counted, mode="r|", bufsize=1 << 20) as members:
            for member in members:
                path = member.name.removeprefix("./").strip("/")
                if path not in {"", "."}:
                    entries[path] = _entry(path, member)
                members.members = []  # or it keeps them all
        while counted.read(1 << 20):
            pass
    return Unpacked(counted.count, list(entries.values()))


def _entry(path: str, member: tarfile.TarInfo) -> Entry:
    return Entry(
        path=path,
        kind=tarfile.REGTYPE if member.isreg() else member.type,
        mode=member.mode & 0o7777,
        owner=(member.uid, member.gid),
        mtime_ns=int(float(member.mtime) * 10**9),
        size=member.size if member.isreg() else 0,
        link=member.linkname,
        xattrs=[
            (key.removeprefix(_PREFIX), value.encode(errors="surrogateescape"))
            for key, value in member.pax_headers.items()
            if key.startswith(_PREFIX)
        ],
    )
