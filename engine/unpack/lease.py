"""A lease that a caller and the work it started hold together: it ends with the last of them.

Async.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from typing import Self

import trio

from engine.kv.environment import Environment
from engine.metadata.leases import leased

__all__ = ["HeldLease", "begun_lease"]


class HeldLease:
    """A lease of this process, for each holder as long as the block of its `hold`."""

    def __init__(self, lease: str, ending: AbstractContextManager[str]) -> None:
        self.id = lease
        self._ending = ending
        self._holders = 0

    @property
    def is_last(self) -> bool:
        """Whether one holder is left."""
        return self._holders == 1

    def hold(self) -> AbstractAsyncContextManager[Self]:
        """Hold the lease from now on, until the end of the block."""
        self._holders += 1
        return self._held()

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[Self]:
        try:
            yield self
        finally:
            self._holders -= 1
            if not self._holders:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._ending.__exit__, None, None, None)


@asynccontextmanager
async def begun_lease(meta: Environment, namespace: str) -> AsyncIterator[HeldLease]:
    """Begin a lease and hold it for the length of a block, at least."""
    ending = leased(meta, namespace)
    begun = HeldLease(await trio.to_thread.run_sync(ending.__enter__), ending)
    async with begun.hold() as lease:
        yield lease
