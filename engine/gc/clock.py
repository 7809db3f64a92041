"""What time it is, as far as expiry may rely on it: a clock that was set anew is not believed at once.

Sync. Expiry means the time of day, which can jump: a dead battery, a wrong hand, a virtual machine that
was restored. Each collection notes what the clock showed, and beside it the time since boot, which does
not jump. Where the two disagree by more than a minute, or a new boot shows a time before the last one,
nothing expires for a quarter of an hour: time to notice, and for a time service to set it right.
"""

import time

from engine import limits
from engine.errors import DataLoss
from engine.kv.environment import Transaction
from engine.kv.schema import CLOCKS, Clock
from engine.processes import boot_id

__all__ = ["look", "read", "time_of", "told"]

_DRIFT = limits.CLOCK_DRIFT_S * 10**9
_GRACE = limits.CLOCK_GRACE_S * 10**9
_NAME = "last"
_UNKNOWN = Clock(boot="", boottime=0, wall=0, doubted_until=1)  # in doubt, in another boot


def read() -> Clock:
    """Return what the clocks of this machine show."""
    boottime = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return Clock(boot=boot_id(), boottime=boottime, wall=time.time_ns())


def look(txn: Transaction, *, note: bool) -> Clock:
    """Return what the clocks show, and until when not to believe them; with `note` for the next too."""
    try:
        last = CLOCKS.get(txn, _NAME)
    except DataLoss:
        last = _UNKNOWN
    seen = told(last, read())
    if note:
        CLOCKS.put(txn, seen, _NAME)
    return seen


def told(last: Clock | None, now: Clock) -> Clock:
    """Return `now`, doubted if the clock jumped since `last`, or is still doubted from then."""
    if last is None:
        return now
    if last.boot != now.boot:
        # How long the machine was off nobody knows; a doubt begins anew, as boots begin at 0.
        doubted = now.wall < last.wall or last.is_doubted
        return Clock(
            boot=now.boot,
            boottime=now.boottime,
            wall=now.wall,
            doubted_until=now.boottime + _GRACE if doubted else 0,
        )
    passed = (now.wall - last.wall) - (now.boottime - last.boottime)
    until = now.boottime + _GRACE if abs(passed) > _DRIFT else last.doubted_until
    return Clock(boot=now.boot, boottime=now.boottime, wall=now.wall, doubted_until=until)


def time_of(clock: Clock) -> int | None:
    """Return the time of day, None where it is doubted."""
    return None if clock.is_doubted else clock.wall
