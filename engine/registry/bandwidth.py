"""A bound on bytes a second, shared by all who take from it.

Async.
"""

import trio

__all__ = ["Bandwidth"]

_BURST_S = 0.1


class Bandwidth:
    """So many bytes a second, and those of a tenth of a second at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._spent = 0.0  # when all that was taken is paid for

    async def take(self, count: int) -> None:
        """Wait until so many bytes more are within the bound."""
        now = trio.current_time()
        self._spent = max(self._spent, now) + count / self._rate
        await trio.sleep(max(0.0, self._spent - now - _BURST_S))
