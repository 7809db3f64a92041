"""Cancels what is done at a chosen step of its tasks.

Async.
"""

from collections.abc import Awaitable, Callable

import trio

__all__ = ["cancelled_at"]


class _Canceller(trio.abc.Instrument):
    """Cancels a scope before the nth step that any task takes, and counts them."""

    def __init__(self, scope: trio.CancelScope, nth: int) -> None:
        self.steps = 0
        self._scope = scope
        self._nth = nth

    def before_task_step(self, _task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self._nth:
            self._scope.cancel()


async def cancelled_at(nth: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Do some work, cancelled at a step; say whether there were so many."""
    with trio.CancelScope() as scope:
        canceller = _Canceller(scope, nth)
        trio.lowlevel.add_instrument(canceller)
        try:
            await work()
        finally:
            trio.lowlevel.remove_instrument(canceller)
    return canceller.steps >= nth
