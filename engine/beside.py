"""Work beside a block, which ends with it.

Async.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["beside"]


@asynccontextmanager
async def beside() -> AsyncIterator[trio.Nursery]:
    """Give a nursery whose tasks are cancelled when the block ends; its own error is raised bare."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001  as a nursery's it would come in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
