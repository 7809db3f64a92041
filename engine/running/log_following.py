"""A container's log as it grows, until the container has ended.

Async.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import trio

from engine.running.logs import LogLine, open_log
from engine.running.outcome import outcome

__all__ = ["follow_log"]

_POLL_S = 0.1


async def follow_log(folder: Path, *, tail: int | None = None, since: int = 0) -> AsyncIterator[LogLine]:
    """Iterate over the lines of a container's log, and over what comes, until nobody writes it any more.

    Who takes long over it misses what was rotated away meanwhile, and holds nobody up.
    """
    with open_log(folder, tail=tail, since=since) as reader:
        while True:
            is_over = not (await trio.to_thread.run_sync(outcome, folder)).monitored
            while lines := await trio.to_thread.run_sync(reader.more):
                for line in lines:
                    yield line
            if is_over:
                return
            await trio.sleep(_POLL_S)
