"""A packed archive's own bytes, in pieces of at most 1 MiB.

Sync. Gzip and zstd are unpacked as layers are; xz and bzip2, in which no layer is packed, by Python's
own modules. The bytes decide. Several streams in a row are one, as their tools write them.
"""

import bz2
import lzma
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

from engine import limits
from engine.diff.decompress import Form, bounded, decompressed, sniff, streams
from engine.oci.mediatypes import Compression

__all__ = ["HEAD", "is_packed", "unpacked"]

HEAD = 10
"""How many bytes at the start of an archive tell how it is packed."""

_XZ = b"\xfd7zXZ\0"
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # from byte 4 on: the first block, or the end of an empty stream

_FORM_XZ = Form(
    "xz",
    partial(lzma.LZMADecompressor, format=lzma.FORMAT_XZ, memlimit=limits.XZ_MEMORY),
    (lzma.LZMAError,),
    fault="damaged or needs too much memory",
    padding=b"\0",
)
_FORM_BZIP2 = Form("bzip2", bz2.BZ2Decompressor, (OSError,))


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
        return bounded(streams(whole, _FORM_XZ), limits.IMAGE)
    if _is_bzip2(head):
        return bounded(streams(whole, _FORM_BZIP2), limits.IMAGE)
    return decompressed(whole, limits.IMAGE)


def _is_xz(head: bytes) -> bool:
    return head.startswith(_XZ)


def _is_bzip2(head: bytes) -> bool:
    return head.startswith(b"BZh") and head[4:10] in _BZIP2
