"""Applies one layer: its packed bytes in, what the backend's sink makes of it out, diff ID on the way.

Sync. The bytes stream once through: inflate, hash, archive, rules, layer tree, sink.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from engine import limits
from engine.callables import named
from engine.diff.budget import Budget
from engine.diff.decompress import decompressed
from engine.diff.layer import LayerTree, Sink, dissolve
from engine.diff.pipeline import ahead, behind
from engine.diff.rules import Rules
from engine.diff.tar import TarReader
from engine.errors import os_errors
from engine.failpoints import hit
from engine.fs.room import Room
from engine.oci.digest import Digest, hasher
from engine.phases import Phase, Timings, measured
from engine.snapshots import Target

__all__ = ["Applied", "apply_layer", "stream"]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a layer: its verified-to-be diff ID, and what it held."""

    diff_id: str
    bytes_unpacked: int
    entries: int
    xattrs_left_out: int
    timings: Timings = {}
    is_reused: bool = False
    """Whether nothing had to be done: its data was here, and takes up so much."""


def apply_layer(
    packed: Iterable[bytes | memoryview],
    target: Target,
    *,
    diff_id: Digest,
    progress: Callable[[int], None] = lambda _read: None,
) -> Applied:
    """Apply the layer in `packed` to `target`, hashing with the algorithm of `diff_id`.

    The caller compares the returned diff ID before it commits. `progress` is told the packed bytes
    read so far. Raises Refused for a bad layer, ResourceExhausted for a full disk and others; what
    is there then is half-made and must be discarded.
    """
    budget = Budget(Room(Path(target.place).parent).take)
    with os_errors("unpacking a layer"), named(target.sink)(target.place) as sink:
        return stream(packed, sink, target, budget, diff_id=diff_id, progress=progress)


def stream(
    packed: Iterable[bytes | memoryview],
    sink: Sink,
    target: Target,
    budget: Budget,
    *,
    diff_id: Digest,
    progress: Callable[[int], None],
) -> Applied:
    """Take a layer through to a sink of `target`, within `budget`; as `apply_layer`."""
    running = hasher(diff_id)
    read = unpacked = 0

    def counted() -> Iterator[bytes | memoryview]:
        nonlocal read
        for piece in packed:
            yield piece
            read += len(piece)

    def told(pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Tell of progress on the caller's own thread: to tell may be to ask whether to go on."""
        for piece in pieces:
            progress(read)
            yield piece
        progress(read)

    def hashed(digest: Callable[[bytes], None]) -> Iterator[bytes]:
        nonlocal unpacked
        for piece in decompressed(counted(), limits.LAYER):
            digest(piece)
            unpacked += len(piece)
            yield piece

    rules = Rules(budget, name_bytes=target.name_bytes, whiteout_names=target.whiteout_names)
    with (
        measured(Phase.WRITE),
        behind(running.update, Phase.HASH) as digest,
        ahead(hashed(digest), Phase.INFLATE) as pieces,
    ):
        without = _build(told(pieces), rules, budget, sink)
    return Applied(
        diff_id=f"{running.name}:{running.hexdigest()}",
        bytes_unpacked=unpacked,
        entries=budget.entries,
        xattrs_left_out=rules.xattrs_left_out + without,
    )


def _build(pieces: Iterator[bytes], rules: Rules, budget: Budget, sink: Sink) -> int:
    """Take the archive in `pieces` through to a sink; return how many ACLs were left out."""
    reader = TarReader(budget.taken(pieces))
    tree = LayerTree(sink, rules, budget)
    try:
        for operation in rules.operations(reader):
            hit("apply.entry")
            tree.apply(operation, reader.payload)
        hit("apply.finish")
        return tree.finish()
    finally:
        dissolve(tree.root)
