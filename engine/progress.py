"""What long work tells about itself while it runs, and how far it is by that.

Pure. A report says all there is to know of its step and item: of those with the same two the last one
counts, whenever it is heard. So who joins late is told each of them once, and knows what others know.
"""

from enum import StrEnum
from typing import Protocol

import msgspec

__all__ = ["Amount", "Headway", "Part", "Report", "Stage", "Step", "Task", "silent"]


class Step(StrEnum):
    """What is being done, or waited for."""

    READ = "reading"
    PUSH = "pushing"
    WAIT = "waiting"
    VERIFY = "verifying"
    COPY = "copying"
    CHECK = "checking"
    SWEEP = "collecting"
    COUNT = "counting"

    # Of a blob or layer of an image, by its digest; in packed bytes but for FLUSH and SHARE.
    STORE = "storing"
    FETCH = "fetching"
    FOUND = "found"
    """So much was here before."""
    KEEP = "keeping"
    """The blob is whole, verified and in the store."""
    PLACE = "waiting for a place"
    """The layer is to be unpacked; first others have their turn."""
    OTHER = "waiting for another process"
    UNPACK = "unpacking"
    BELOW = "waiting for layers below"
    FLUSH = "committing"
    """So many layers are made durable and visible, together."""
    SHARE = "sharing"
    """So many callers want it; of all of the work the item is empty."""
    DONE = "done"
    """Nothing is left to do for it."""


class Report(Protocol):
    """Called with a step, what it works on, how much there is (bytes, layers, records), and is done.

    How much there is of a pipe is 0 until its end: nobody knows. What waits is over when all is done.
    Called often and from any thread: return at once.
    """

    def __call__(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Take note."""


def silent(_step: Step, _item: str, _total: int, _done: int, /) -> None:
    """Tell nobody."""


class Stage(StrEnum):
    """How far a blob or layer is."""

    WAITING = "waiting"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    APPLYING = "applying"
    COMMITTING = "committing"
    DONE = "done"


class Amount(msgspec.Struct, frozen=True):
    """Bytes that are done, of how many; how many a second of late, and how long the rest takes so."""

    done: int = 0
    total: int = 0
    rate: float = 0.0
    found: int = 0
    """How many of those done were here before: of them there is no rate."""

    @property
    def remaining(self) -> float | None:
        """Seconds to the end at this rate; None if nobody can tell."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate if self.rate else None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A blob, or a layer by its blob. It is fetched (or stored) and then applied, or one of the two."""

    digest: str
    stage: Stage
    fetch: Amount | None = None
    apply: Amount | None = None
    waits_for: Step | None = None
    """PLACE, OTHER or BELOW; it may be on its way in meanwhile."""
    callers: int = 1
    """How many wait for it in this process; the work is done once."""


class Task(msgspec.Struct, frozen=True):
    """Work under way that is not about one blob or layer."""

    step: Step
    item: str
    total: int
    done: int


class Headway(msgspec.Struct, frozen=True, kw_only=True):
    """How far work is: its parts in the order of the image, lowest layer first, and their sums."""

    parts: tuple[Part, ...] = ()
    fetch: Amount = Amount()
    apply: Amount = Amount()
    tasks: tuple[Task, ...] = ()
    callers: int = 1
    """How many wait for all of it: pulls of one image are one."""
    waits: tuple[str, ...] = ()
    """What all of it waits for, in words: another process, by its ID."""

    @property
    def done(self) -> int:
        """How many parts are done."""
        return sum(part.stage is Stage.DONE for part in self.parts)

    @property
    def remaining(self) -> float | None:
        """Seconds to the end of fetching and of applying; None if nobody can tell."""
        fetch, apply = self.fetch.remaining, self.apply.remaining
        return None if fetch is None or apply is None else max(fetch, apply)
