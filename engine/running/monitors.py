"""Starts containers, each under a monitor of its own, which outlives the engine.

Async. Monitors are forked from one process, the reaper (`engine.running.reaper`), which is started when
first needed: a fork of it takes a millisecond, a Python of one's own twenty.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from engine.running.attaching import Attachment
from engine.running.jobs import Launch

__all__ = ["Begun", "Monitors", "open_monitors"]


@dataclass(frozen=True)
class Begun:
    """A container that was started."""

    pid: int
    """Of its process, in the engine's pid namespace."""
    attachment: Attachment | None
    """The first client, where the job says `attached`: the caller's to close."""


class Monitors:
    """What starts containers; get one from `open_monitors`."""

    async def prepare(self) -> None:
        """Start the reaper, so that it is ready when it is needed; that is not waited for."""
        raise NotImplementedError

    async def start(self, launch: Launch) -> Begun:
        """Start a container and return once its process runs, or has run.

        CommandFailed if its command cannot be run (126, 127), EngineError for all else that the runtime
        says. What is cancelled, or fails, leaves no process; the runtime's state and the cgroup are to
        be deleted (`engine.running.runc.delete`).
        """
        raise NotImplementedError


@asynccontextmanager
async def open_monitors() -> AsyncIterator[Monitors]:
    """Give what starts containers for the length of a block; they run on after it."""
    yield Monitors()
