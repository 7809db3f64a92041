"""Where the time of an import or unpack goes: phases, each busy or waiting.

Sync; safe from any thread. Busy is a thread's time on a processor; waiting is the rest: for other
phases, for the disk, for a processor that others have. Phases overlap: they add up to more than a clock.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

import msgspec

__all__ = ["Phase", "Spent", "Timings", "collecting", "measured", "since", "spend", "total"]


class Phase(StrEnum):
    """What there is to do for an image, in the order of its bytes."""

    FETCH = "fetch"
    INFLATE = "inflate"
    HASH = "hash"
    WRITE = "write"
    COMMIT = "commit"
    FLUSH = "flush"


class Spent(msgspec.Struct, frozen=True):
    """Seconds."""

    busy: float = 0.0
    waiting: float = 0.0


Timings = Mapping[Phase, Spent]

_lock = threading.Lock()
_collecting: dict[int, dict[Phase, Spent]] = {}  # by identity: equal sums are not the same


def total(*timings: Timings) -> dict[Phase, Spent]:
    """Return what was spent in each phase altogether."""
    sums: dict[Phase, Spent] = {}
    for phase in Phase:
        found = [one[phase] for one in timings if phase in one]
        if found:
            busy, waiting = sum(one.busy for one in found), sum(one.waiting for one in found)
            sums[phase] = Spent(busy, waiting)
    return sums


def since(before: Timings, now: Timings) -> dict[Phase, Spent]:
    """Return what was spent between two looks at a sum."""
    nothing = Spent()
    return {
        phase: Spent(
            spent.busy - before.get(phase, nothing).busy,
            spent.waiting - before.get(phase, nothing).waiting,
        )
        for phase, spent in now.items()
    }


@contextmanager
def measured(phase: Phase, into: dict[Phase, Spent] | None = None) -> Iterator[None]:
    """Note what this thread spends in the block: `into` a sum, or in that of this process's one job."""
    clock, busy = time.perf_counter(), time.thread_time()
    try:
        yield
    finally:
        busy = time.thread_time() - busy
        spend(phase, Spent(busy, max(0.0, time.perf_counter() - clock - busy)), into)


def spend(phase: Phase, spent: Spent, into: dict[Phase, Spent] | None = None) -> None:
    """Note what was spent: `into` a sum, or in that of this process's one job."""
    with _lock:
        for sums in _collecting.values() if into is None else (into,):
            sums.update(total(sums, {phase: spent}))


@contextmanager
def collecting() -> Iterator[dict[Phase, Spent]]:
    """Give the sum of what all threads spend on the job of the block: a worker has one at a time."""
    sums: dict[Phase, Spent] = {}
    with _lock:
        _collecting[id(sums)] = sums
    try:
        yield sums
    finally:
        with _lock:
            del _collecting[id(sums)]
