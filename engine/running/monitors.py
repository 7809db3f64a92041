"""Starts containers, each under a monitor of its own, which outlives the engine.

Async. Monitors are forked from one process, the reaper (`engine.running.reaper`), which is started when
first needed: a fork of it takes a millisecond, a Python of one's own twenty.
"""

import array
import socket
import subprocess
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
from engine.running.reaper import COMMAND
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


class _Reaper:
    """A reaper, and the socket that takes jobs to it."""

    def __init__(self, process: trio.Process, jobs: trio.socket.SocketType) -> None:
        self._process = process
        self._jobs = jobs

    async def give(self, job: bytes, channel: socket.socket) -> None:
        """Have it do a job. OSError if it is dead."""
        files = array.array("i", [channel.fileno()])
        await self._jobs.sendmsg([job], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])

    async def stop(self) -> None:
        """Let it end, as it does by itself when nobody can give it anything."""
        self._jobs.close()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_PATIENCE_S):
                await self._process.wait()
                return
            self._process.kill()
            await self._process.wait()


class Monitors:
    """What starts containers; get one from `open_monitors`."""

    def __init__(self) -> None:
        self._reaper: _Reaper | None = None
        self._starting = trio.Lock()

    async def prepare(self) -> None:
        """Start the reaper, so that it is ready when it is needed; that is not waited for."""
        await self._ready()

    async def _ready(self) -> _Reaper:
        async with self._starting:
            if self._reaper is None:
                self._reaper = await _started()
            return self._reaper

    async def _dismiss(self, reaper: _Reaper) -> None:
        if self._reaper is reaper:
            self._reaper = None
        await reaper.stop()

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
        reaper = await self._ready()
        ours, theirs = _pair(socket.SOCK_STREAM)
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


def _pair(kind: socket.SocketKind) -> tuple[trio.socket.SocketType, socket.socket]:
    """Return the two ends of a connection: ours, and one for a process that waits by blocking."""
    with os_errors("starting a container"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    return trio.socket.from_stdlib_socket(ours), theirs


async def _started() -> _Reaper:
    ours, theirs = _pair(socket.SOCK_SEQPACKET)
    with theirs, os_errors("starting what starts containers"):
        try:
            process = await trio.lowlevel.open_process(
                COMMAND,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # what a terminal sends is not for it, nor for monitors
            )
        except BaseException:
            ours.close()
            raise
    return _Reaper(process, ours)


@asynccontextmanager
async def open_monitors() -> AsyncIterator[Monitors]:
    """Give what starts containers for the length of a block; they run on after it."""
    monitors = Monitors()
    try:
        yield monitors
    finally:
        await monitors.aclose()
