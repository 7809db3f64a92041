"""What long work tells about itself while it runs. Pure."""

from enum import StrEnum
from typing import Protocol

__all__ = ["Report", "Step", "silent"]


class Step(StrEnum):
    """What is being done, or waited for."""

    READ = "reading"
    STORE = "storing"
    FETCH = "fetching"
    PUSH = "pushing"
    WAIT = "waiting"
    UNPACK = "unpacking"
    FLUSH = "committing"
    VERIFY = "verifying"
    COPY = "copying"
    CHECK = "checking"
    SWEEP = "collecting"
    COUNT = "counting"


class Report(Protocol):
    """Called with a step, what it works on, how much there is (bytes, layers, records), and is done.

    How much there is of a pipe is 0 until its end: nobody knows.
    Called often and from any thread: return at once.
    """

    def __call__(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Take note."""


def silent(_step: Step, _item: str, _total: int, _done: int, /) -> None:
    """Tell nobody."""
