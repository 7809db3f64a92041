"""Holds a layer against what was made of it, as its bytes stream by: nothing is written.

Sync. The same stream through the same rules as `engine.diff.apply`, into a sink that looks where the
other writes. Contents are compared piece by piece, so that nobody needs to have kept their hashes.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from engine.callables import named
from engine.diff.apply import stream
from engine.diff.budget import Budget
from engine.diff.layer import Sink
from engine.errors import os_errors
from engine.oci.digest import Digest
from engine.snapshots import Target

__all__ = ["Compared", "Comparison", "Difference", "How", "compare_layer"]


class How(StrEnum):
    """How something on disk differs from the layer."""

    MISSING = "missing"
    CHANGED = "changed"
    ADDED = "added"


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as the layer made it; `path` is below the snapshot's root."""

    path: str
    how: How
    detail: str = ""
    by_below: bool = False
    """Whether it follows from what the layers below have, and so is certain only if they are whole."""


class Comparison(Sink, Protocol):
    """A sink that looks where others write."""

    def differences(self) -> Sequence[Difference]:
        """Return what differs, once the layer has ended."""


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a comparison; the diff ID is for the caller to hold against the one promised."""

    diff_id: str
    bytes_unpacked: int
    differences: Sequence[Difference]


def compare_layer(
    packed: Iterable[bytes | memoryview],
    target: Target,
    *,
    diff_id: Digest,
    progress: Callable[[int], None] = lambda _read: None,
) -> Compared:
    """Hold the layer in `packed` against the snapshot that `target` gives a `Comparison` of.

    Raises Refused for a bad layer, DataLoss where there is no folder at all.
    """
    with os_errors("comparing a layer"), named(target.sink)(target.place) as sink:
        passed = stream(packed, sink, target, Budget(), diff_id=diff_id, progress=progress)
        found: Sequence[Difference] = sink.differences()
    return Compared(diff_id=passed.diff_id, bytes_unpacked=passed.bytes_unpacked, differences=found)
