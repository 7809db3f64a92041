"""Applies one layer: its packed bytes in, a folder and its notes out, the diff ID on the way.

Sync. The bytes stream once through: inflate, hash, archive, rules, sink.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from engine.diff import notes
from engine.diff.decompress import decompressed
from engine.diff.pipeline import ahead
from engine.diff.rules import Rules
from engine.diff.sink import FolderSink
from engine.diff.tar import TarReader
from engine.errors import os_errors
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.oci.digest import Digest, hasher
from engine.oci.mediatypes import Compression
from engine.snapshots import Target

__all__ = ["Applied", "apply_layer"]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a layer: its verified-to-be diff ID, and what it held."""

    diff_id: str
    bytes_unpacked: int
    entries: int
    xattrs_left_out: int


def apply_layer(
    packed: Iterable[bytes | memoryview],
    compression: Compression,
    target: Target,
    *,
    diff_id: Digest,
    progress: Callable[[int], None] = lambda _read: None,
) -> Applied:
    """Apply the layer in `packed` to `target`, hashing with the algorithm of `diff_id`.

    The caller compares the returned diff ID before it commits. `progress` is told the packed bytes
    read so far. Raises Refused for a bad layer, ResourceExhausted for a full disk and others; the
    folder is then half-made and must be discarded.
    """
    running = hasher(diff_id)
    unpacked = 0

    def counted() -> Iterator[bytes | memoryview]:
        read = 0
        for piece in packed:
            yield piece
            read += len(piece)
            progress(read)

    def hashed() -> Iterator[bytes]:
        nonlocal unpacked
        for piece in decompressed(counted(), compression):
            running.update(piece)
            unpacked += len(piece)
            yield piece

    rules = Rules(name_bytes=target.name_bytes, whiteout_names=target.whiteout_names)
    with os_errors("unpacking a layer"), ahead(hashed()) as pieces:
        _write_tree(pieces, rules, target)
    return Applied(
        diff_id=f"{running.name}:{running.hexdigest()}",
        bytes_unpacked=unpacked,
        entries=rules.entries,
        xattrs_left_out=rules.xattrs_left_out,
    )


def _write_tree(pieces: Iterator[bytes], rules: Rules, target: Target) -> None:
    with folder_descriptor(Path(target.folder)) as root:
        sink = FolderSink(root, rules)
        try:
            reader = TarReader(pieces)
            for operation in rules.operations(reader):
                hit("apply.entry")
                sink.apply(operation, reader.payload)
            hit("apply.finish")
            notes.save(sink.finish(), Path(target.notes))
        finally:
            sink.close()
