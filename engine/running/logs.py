"""What a container wrote, read from its log: files in the CRI's format, `log` and before it `log.1`.

Sync; safe from any thread and process.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

__all__ = ["LogFollower", "LogLine", "read_log"]


class LogLine(msgspec.Struct, frozen=True):
    """A line, with the newline that it ends with; of a very long one, or an unfinished one, a part."""

    at: int
    """When the first of it was written: nanoseconds since the epoch."""
    channel: str
    """`stdout` or `stderr`."""
    data: bytes


def read_log(folder: Path, *, tail: int | None = None, since: int = 0) -> Iterator[LogLine]:
    """Iterate over the lines of a container's log: the last `tail` of those from `since` on."""
    raise NotImplementedError


class LogFollower:
    """Reads on where the log grows: `read_log` first, then, by `more`, what came meanwhile."""

    def __init__(self, folder: Path, *, tail: int | None = None, since: int = 0) -> None:
        raise NotImplementedError

    def more(self) -> list[LogLine]:
        """Return what there is since the last call, a bounded part of it at once; empty if nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files."""
        raise NotImplementedError
