"""A client of a container's monitor: what the container writes, what is written to it, and its end.

Async. The protocol is in `engine.running.frames`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path

from engine.running.outcome import Outcome

__all__ = ["Attachment", "Channel", "attach", "ended"]


class Channel(StrEnum):
    """Where a container wrote something."""

    STDOUT = "stdout"
    STDERR = "stderr"


class Attachment:
    """A connection to a container that runs: iterate over what it writes. Others may write meanwhile.

    The container goes on when it is closed. One that is not read from holds the container up.
    """

    outcome: Outcome | None
    """How it ended; None until the iteration has."""

    async def send(self, data: bytes) -> None:
        """Write to the container's input; what has ended takes no more, without an error."""
        raise NotImplementedError

    async def close_stdin(self) -> None:
        """End the container's input; of a terminal: as Ctrl-D does."""
        raise NotImplementedError

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the container's terminal; without one, nothing."""
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[tuple[Channel, bytes]]:
        """Iterate over what it writes, until it ends. Unavailable if its monitor dies."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Leave."""
        raise NotImplementedError


@asynccontextmanager
async def attach(folder: Path) -> AsyncIterator[Attachment]:
    """Give a connection to the container of a folder for the length of a block.

    FailedPrecondition if no monitor serves it: it has ended (`outcome`), or is unmonitored.
    """
    yield Attachment()


async def ended(folder: Path) -> Outcome:
    """Wait until the container of a folder has ended, or nobody watches it; return what is known."""
    raise NotImplementedError
