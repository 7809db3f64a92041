"""Starts containers, each under a monitor of its own, which outlives the engine.

Async. Monitors are forked from one process, the reaper (`engine.running.reaper`), which is started when
first needed: a fork of it takes a millisecond, a Python of one's own twenty.
"""

import array
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio

from engine.errors import EngineError, Unavailable, by_name, os_errors
from engine.limits import START_GRACE_S
from engine.running.attaching import Attachment
from engine.running.frames import EXIT, FAILED, KILL, STARTED, frame
from engine.running.jobs import Launch, encoded
from engine.running.reaping import Reaper, begin
from engine.running.runc import failure

__all__ = ["Begun", "Monitors", "open_monitors"]

_PATIENCE_S = 0.5  # with a reaper that nobody needs any more
_KILLED_S = 2 * START_GRACE_S  # for what was cancelled to be gone


@dataclass(frozen=True)
class Begun:
    """A container that was started."""

    pid: int
    """Of its process, in the engine's pid namespace."""
    attachment: Attachment | None
    """The first client, where the job says `attached`: the caller's to close."""


class _Failed(msgspec.Struct, frozen=True):
    """What `FAILED` holds; without a kind, what the runtime said."""

    kind: str
    message: str

    @property
    def error(self) -> EngineError:
        return by_name(self.kind, self.message) if self.kind else failure(self.message)


class _NeverForked(Exception):
    """The reaper died before it began: another may do it."""


class _Employed:
    """A reaper that this engine gives jobs to."""

    def __init__(self, reaper: Reaper) -> None:
        self._pid = reaper.pid
        self._jobs = trio.socket.from_stdlib_socket(reaper.jobs)

    async def give(self, job: bytes, channel: socket.socket) -> None:
        """Have it do a job. OSError if it is dead."""
        files = array.array("i", [channel.fileno()])
        await self._jobs.sendmsg([job], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])

    async def dismiss(self) -> None:
        """Let it end, as it does by itself when nobody can give it anything."""
        self._jobs.close()
        ended = os.pidfd_open(self._pid)
        try:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(_PATIENCE_S) as patience:
                    await trio.lowlevel.wait_readable(ended)
                if patience.cancelled_caught:
                    os.kill(self._pid, signal.SIGKILL)
                    await trio.lowlevel.wait_readable(ended)
        finally:
            os.close(ended)
            os.waitpid(self._pid, 0)  # noqa: ASYNC222  it has ended


class Monitors:
    """What starts containers; get one from `open_monitors`."""

    def __init__(self, reaper: Reaper | None) -> None:
        """`reaper` is one that was started already."""
        self._reaper = _Employed(reaper) if reaper else None

    def prepare(self) -> None:
        """Start the reaper, so that it is ready when it is needed; that is not waited for."""
        self._ready()

    def _ready(self) -> _Employed:
        if self._reaper is None:
            self._reaper = _Employed(begin())
        return self._reaper

    async def _dismiss(self, reaper: _Employed) -> None:
        if self._reaper is reaper:
            self._reaper = None
            await reaper.dismiss()

    async def start(self, launch: Launch) -> Begun:
        """Start a container and return once its process runs, or has run.

        CommandFailed if its command cannot be run (126, 127), EngineError for all else that the runtime
        says. What is cancelled, or fails, leaves no process; the runtime's state and the cgroup are to
        be deleted (`engine.running.runc.delete`).
        """
        try:
            return await self._start(launch)
        except _NeverForked:
            try:
                return await self._start(launch)
            except _NeverForked:
                raise Unavailable("what starts containers was killed; try again") from None

    async def _start(self, launch: Launch) -> Begun:
        reaper = self._ready()
        ours, theirs = _pair()
        attachment = Attachment(ours)
        is_kept = False
        try:
            with theirs:
                await reaper.give(encoded(launch), theirs)
            begun = Begun(await _told(attachment), attachment if launch.attached else None)
            is_kept = launch.attached
            return begun
        except trio.Cancelled:
            await _kill(attachment)
            raise
        except (OSError, EOFError):
            # It is the first thing that a monitor makes.
            if await trio.Path(launch.folder, "monitor").exists():
                raise Unavailable("the monitor of the container was killed as it began") from None
            await self._dismiss(reaper)
            raise _NeverForked from None
        finally:
            if not is_kept:
                ours.close()

    async def aclose(self) -> None:
        """End the reaper. Containers and their monitors go on."""
        if self._reaper is not None:
            await self._dismiss(self._reaper)


async def _told(attachment: Attachment) -> int:
    """Return the pid of a container that was started. EOFError if nobody tells."""
    kind, data = await attachment.hear()
    if kind == FAILED:
        raise msgspec.json.decode(data, type=_Failed).error
    assert kind == STARTED
    return int(data)


async def _kill(attachment: Attachment) -> None:
    """Kill what was begun, and wait until it is gone."""
    with trio.CancelScope(shield=True), trio.move_on_after(_KILLED_S):
        await attachment.say(frame(KILL))
        try:
            while (await attachment.hear())[0] not in {EXIT, FAILED}:
                pass
        except EOFError:
            pass


def _pair() -> tuple[trio.socket.SocketType, socket.socket]:
    """Return the two ends of a connection: ours, and one for a process that waits by blocking."""
    with os_errors("starting a container"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return trio.socket.from_stdlib_socket(ours), theirs


@asynccontextmanager
async def open_monitors(reaper: Reaper | None = None) -> AsyncIterator[Monitors]:
    """Give what starts containers for the length of a block; they run on after it.

    A `reaper` that was started already is used, and ended with the block.
    """
    monitors = Monitors(reaper)
    try:
        yield monitors
    finally:
        await monitors.aclose()
