"""A clock that tests move by hand: what records and collections take for the time.

Sync. It never jumps: the time since boot goes with it, so that expiry believes it (`engine.gc.clock`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.gc import clock as gc_clock
from engine.kv import schema

__all__ = ["HOUR", "HandClock", "clock_by_hand"]

HOUR = 3600 * 10**9


class HandClock:
    """Stands for the module `time` where the time of day is asked for."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.at = 500_000 * HOUR

    def time_ns(self) -> int:
        """Return the time of day."""
        return self.at

    def clock_gettime_ns(self, _clock: int) -> int:
        """Return the time since boot."""
        return self.at


@contextmanager
def clock_by_hand() -> Iterator[HandClock]:
    """Have all go by one clock, for the length of a block."""
    clock = HandClock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (schema, gc_clock):
            patch.setattr(module, "time", clock)
        yield clock
