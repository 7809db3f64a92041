"""A layer's packed bytes in, its archive's bytes out, in pieces of at most 1 MiB.

Sync; the only owner of isal and zstandard. The bytes alone decide how they are packed. Nothing from
PATH is ever run. Output is bounded by size, never by ratio: a disk image of zeros is an honest layer.
Bad checksums, bytes after the stream and a cut gzip stream are errors; a zstd stream that ends between
two blocks is only found out by what reads the bytes, and by the diff ID.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import IO, NamedTuple, Protocol, cast

import zstandard
from isal import igzip_lib

from engine import limits
from engine.errors import Refused
from engine.oci.mediatypes import Compression

__all__ = ["SNIFFED", "Form", "bounded", "decompressed", "sniff", "streams"]

SNIFFED = 4
"""How many of the first bytes tell how the rest is packed."""
_PIECE = 1 << 20
_FEED = 1 << 18  # compressed bytes handed over at once: what a stream's end leaves is copied

_GZIP_MAGIC = b"\x1f\x8b\x08"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of 0x184D2A50 to 0x184D2A5F, little-endian


class _Stream(Protocol):
    """What isal, lzma and bz2 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int = -1, /) -> bytes: ...


class Form(NamedTuple):
    """A way to pack, of which several streams in a row are one; `padding` may stand between them."""

    name: str
    begin: Callable[[], _Stream]
    errors: tuple[type[Exception], ...]
    fault: str = "damaged"
    padding: bytes = b""


_GZIP = Form(
    "gzip",
    partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP),
    (igzip_lib.IsalError,),  # type: ignore[arg-type]  # its stub calls it a variable
)


def sniff(head: bytes) -> Compression:
    """Return how bytes that begin with `head` are packed."""
    if head.startswith(_GZIP_MAGIC):
        return Compression.GZIP
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5):
        return Compression.ZSTD
    return Compression.NONE


def decompressed(packed: Iterable[bytes | memoryview], limit: int) -> Iterator[bytes]:
    """Yield the unpacked bytes of `packed`. Refused for damaged ones, and beyond `limit` bytes."""
    source = iter(packed)
    head = b""
    while len(head) < SNIFFED and (piece := next(source, b"")):
        head += piece
    found = sniff(head)
    whole = chain((head,), source)
    if found is Compression.GZIP:
        unpacked = streams(whole, _GZIP)
    elif found is Compression.ZSTD:
        unpacked = _unzstd(whole)
    else:
        unpacked = _plain(whole)
    return bounded(unpacked, limit)


def bounded(unpacked: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Yield `unpacked`. Refused beyond `limit` bytes."""
    written = 0
    for piece in unpacked:
        written += len(piece)
        if written > limit:
            raise Refused(f"over {limit} bytes unpacked")
        yield piece


def _plain(packed: Iterator[bytes | memoryview]) -> Iterator[bytes]:
    for piece in packed:
        if len(piece) <= _PIECE:
            yield bytes(piece)
        else:
            yield from map(bytes, _slices(iter((piece,)), _PIECE))


def streams(packed: Iterator[bytes | memoryview], form: Form) -> Iterator[bytes]:
    """Yield what streams in a row unpack to. Refused for damaged ones, and for too many tiny ones."""
    stream, begun, written = form.begin(), 1, 0
    for feed in _slices(packed, _FEED):
        pending: bytes | memoryview = feed
        while len(pending) or not (stream.needs_input or stream.eof):
            if stream.eof:
                pending = bytes(pending).lstrip(form.padding)
                if not pending:
                    break
                begun += 1
                if begun > limits.STREAMS + written // 512:
                    raise Refused(f"made of too many tiny {form.name} streams")
                stream = form.begin()
            try:
                piece = stream.decompress(pending, _PIECE)
            except form.errors as error:
                raise Refused(f"the {form.name} stream is {form.fault}: {error}") from None
            pending = stream.unused_data if stream.eof else b""
            written += len(piece)
            if piece:
                yield piece
    if not stream.eof:
        raise Refused(f"the {form.name} stream is cut off")


def _slices(packed: Iterator[bytes | memoryview], size: int) -> Iterator[memoryview]:
    for piece in packed:
        view = memoryview(piece)
        for start in range(0, len(view), size):
            yield view[start : start + size]


class _Source(io.RawIOBase):
    """The file that zstandard's reader wants, over pieces."""

    def __init__(self, packed: Iterator[bytes | memoryview]) -> None:
        self._pieces = _slices(packed, _FEED)

    def read(self, _size: int = -1) -> bytes:
        return bytes(next(self._pieces, b""))


def _unzstd(packed: Iterator[bytes | memoryview]) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=limits.ZSTD_WINDOW)
    # A streaming reader, because a decompressobj returns whatever one input gives: gigabytes.
    reader = unpacker.stream_reader(
        cast("IO[bytes]", _Source(packed)), read_size=_FEED, read_across_frames=True
    )
    try:
        while piece := reader.read(_PIECE):
            yield piece
    except zstandard.ZstdError as error:
        raise Refused(f"the zstd stream is damaged: {error}") from None
