"""What a check finds and what a repair does about it, as values. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from engine.diff.compare import Difference

__all__ = ["Checked", "Counts", "Finding", "Mend", "Trouble", "What"]


class What(StrEnum):
    """What a finding is about."""

    RECORD = "record"
    EDGE = "edge"
    COUNTER = "counter"
    PAGES = "pages"
    IMAGE = "image"
    BLOB = "blob"
    EXTENTS = "extents"
    SNAPSHOT = "snapshot"
    FOLDER = "folder"
    MOUNT = "mount"
    CONTAINER = "container"
    TRASH = "trash"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it should be, or that could not be told.

    Without `is_damage` it is a note: nothing is lost, and nothing has to be done.
    """

    what: What
    name: str
    namespace: str = ""
    snapshotter: str = ""
    detail: str
    is_damage: bool = True
    differences: tuple[Difference, ...] = ()
    done: str = ""
    """What a repair did about it."""
    waits: str = ""
    """Why a repair could do nothing about it yet."""

    @property
    def is_left(self) -> bool:
        """Whether this is damage that is still there."""
        return self.is_damage and not self.done


Mend = Callable[[], str]
"""Repairs one thing after a second look, and says what was done; raises EngineError if it cannot be."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """A finding, and what mends it if anything does."""

    finding: Finding
    mend: Mend | None = None


class Counts(msgspec.Struct, kw_only=True):
    """How much was looked at; `by_attributes` are snapshots whose layer is not here to compare with."""

    records: int = 0
    images: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    snapshots: int = 0
    snapshot_bytes: int = 0
    by_attributes: int = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a check."""

    findings: list[Finding]
    counts: Counts

    @property
    def left(self) -> list[Finding]:
        """The damage that is still there."""
        return [finding for finding in self.findings if finding.is_left]
