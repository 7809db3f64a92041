"""A packed archive's own bytes, in pieces of at most 1 MiB.

Sync. Gzip and zstd are unpacked as layers are; xz and bzip2, in which no layer is packed, by Python's
own modules. The bytes decide. Several streams in a row are one, as their tools write them.
"""

import bz2
import lzma
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Protocol

from engine import limits
from engine.diff.decompress import decompressed, sniff
from engine.errors import Refused
from engine.oci.mediatypes import Compression

__all__ = ["HEAD", "is_packed", "unpacked"]

HEAD = 10
"""How many bytes at the start of an archive tell how it is packed."""

_PIECE = 1 << 20
_FEED = 1 << 16  # packed bytes handed over at once: what a stream's end leaves is copied
_STREAMS = 1024  # streams that may be small; beyond that each must give 512 bytes on average

_XZ = b"\xfd7zXZ\0"
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # from byte 4 on: the first block, or the end of an empty stream


class _Unpacker(Protocol):
    """What lzma and bz2 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


_BEGIN_XZ = partial(lzma.LZMADecompressor, format=lzma.FORMAT_XZ, memlimit=limits.XZ_MEMORY)


def is_packed(head: bytes) -> bool:
    """Say whether an archive that begins so is packed."""
    return _is_xz(head) or _is_bzip2(head) or sniff(head) is not Compression.NONE


def unpacked(archive: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of an archive, unpacked if it is packed. Refused for what is damaged."""
    pieces = iter(archive)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= HEAD:
            break
    whole = chain((head,), pieces)
    if _is_xz(head):
        return _streams(whole, _BEGIN_XZ, "xz")
    if _is_bzip2(head):
        return _streams(whole, bz2.BZ2Decompressor, "bzip2")
    return decompressed(whole, limits.IMAGE)


def _is_xz(head: bytes) -> bool:
    return head.startswith(_XZ)


def _is_bzip2(head: bytes) -> bool:
    return head.startswith(b"BZh") and head[4:10] in _BZIP2


def _streams(packed: Iterator[bytes], begin: Callable[[], _Unpacker], kind: str) -> Iterator[bytes]:
    stream, streams, written = begin(), 1, 0
    for feed in _slices(packed):
        pending = feed
        while pending or not (stream.needs_input or stream.eof):
            if stream.eof:
                pending = pending.lstrip(b"\0") if kind == "xz" else pending  # xz pads with zeros
                if not pending:
                    break
                streams += 1
                if streams > _STREAMS + written // 512:
                    raise Refused(f"made of too many tiny {kind} streams")
                stream = begin()
            try:
                piece = stream.decompress(pending, _PIECE)
            except (lzma.LZMAError, OSError) as error:
                raise Refused(
                    f"the {kind} stream is damaged or needs too much memory: {error}"
                ) from None
            pending = stream.unused_data if stream.eof else b""
            written += len(piece)
            if piece:
                yield piece
    if not stream.eof:
        raise Refused(f"the {kind} stream is cut off")


def _slices(packed: Iterator[bytes]) -> Iterator[bytes]:
    for piece in packed:
        for start in range(0, len(piece), _FEED):
            yield piece[start : start + _FEED]
