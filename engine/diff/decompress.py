"""A layer's packed bytes in, its archive's bytes out, in pieces of at most 1 MiB.

Sync; the only owner of isal and zstandard. The bytes alone decide how they are packed. Nothing from
PATH is ever run. Output is bounded by size, never by ratio: a disk image of zeros is an honest layer.
Bad checksums, bytes after the stream and a cut gzip stream are errors; a zstd stream that ends between
two blocks is only found out by what reads the bytes, and by the diff ID.
"""

import io
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, cast

import zstandard
from isal import igzip_lib

from engine import limits
from engine.errors import Refused
from engine.oci.mediatypes import Compression

__all__ = ["SNIFFED", "decompressed", "sniff"]

SNIFFED = 4
"""How many of the first bytes tell how the rest is packed."""
_PIECE = 1 << 20
_FEED = 1 << 18  # compressed bytes handed over at once: what a member's end leaves is copied
_GZIP_MEMBERS = 1024  # members that may be small; beyond that each must give 512 bytes on average

_GZIP_MAGIC = b"\x1f\x8b\x08"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of 0x184D2A50 to 0x184D2A5F, little-endian


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
        unpacked = _gunzip(whole)
    elif found is Compression.ZSTD:
        unpacked = _unzstd(whole)
    else:
        unpacked = _plain(whole)
    return _bounded(unpacked, limit)


def _bounded(unpacked: Iterator[bytes], limit: int) -> Iterator[bytes]:
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


def _gunzip(packed: Iterator[bytes | memoryview]) -> Iterator[bytes]:
    members, written = 1, 0
    stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    rest = b""
    for feed in _slices(packed, _FEED):
        pending: bytes | memoryview = feed if not rest else rest + bytes(feed)
        rest = b""
        while len(pending) or not (stream.needs_input or stream.eof):
            if stream.eof:
                members += 1
                if members > _GZIP_MEMBERS + written // 512:
                    raise Refused("made of too many tiny gzip members")
                stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            try:
                piece = stream.decompress(pending, _PIECE)
            except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub calls it a variable
                raise Refused(f"the gzip stream is damaged: {error}") from None
            pending = stream.unused_data if stream.eof else b""
            written += len(piece)
            if piece:
                yield piece
    if not stream.eof:
        raise Refused("the gzip stream is cut off")


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
