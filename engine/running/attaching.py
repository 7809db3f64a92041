"""A client of a container's monitor: what the container writes, what is written to it, and its end.

Async. The protocol is in `engine.running.frames`.
"""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path

import trio

from engine.errors import FailedPrecondition, Unavailable, os_errors
from engine.running.frames import (
    ATTACH,
    EXIT,
    LARGEST,
    STDERR,
    STDIN,
    STDOUT,
    FrameError,
    frame,
    resize,
    take,
)
from engine.running.outcome import Outcome, outcome, parsed

__all__ = ["Attachment", "Channel", "attach", "ended"]

_POLL_S = 0.01  # for a monitor to begin or to stop serving


class Channel(StrEnum):
    """Where a container wrote something."""

    STDOUT = "stdout"
    STDERR = "stderr"


_CHANNELS = {STDOUT: Channel.STDOUT, STDERR: Channel.STDERR}


class Attachment:
    """A connection to a container that runs: iterate over what it writes. Others may write meanwhile.

    The container goes on when it is closed. One that is not read from holds the container up.
    """

    outcome: Outcome | None = None
    """How it ended; None until the iteration has."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection
        self._came = bytearray()
        self._to_send = bytearray()
        self._sending = trio.Lock()

    async def send(self, data: bytes) -> None:
        """Write to the container's input, as it is read; what has ended takes none, without an error."""
        for start in range(0, len(data), LARGEST):
            await self.say(frame(STDIN, data[start : start + LARGEST]))

    async def close_stdin(self) -> None:
        """End the container's input; of a terminal: as Ctrl-D does."""
        await self.say(frame(STDIN))

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the container's terminal; without one, nothing."""
        await self.say(resize(rows, columns))

    async def say(self, framed: bytes) -> None:
        """Send a frame. If that is cancelled, what is left of it goes before the next."""
        async with self._sending:
            self._to_send += framed
            try:
                while self._to_send:
                    del self._to_send[: await self._connection.send(self._to_send)]
            except OSError:  # the container has ended, or its monitor: who reads is told
                self._to_send.clear()

    async def hear(self) -> tuple[bytes, bytes]:
        """Return the next frame; if cancelled, nothing is lost. EOFError if the monitor is gone."""
        while True:
            try:
                if taken := take(self._came):
                    return taken
                data = await self._connection.recv(LARGEST)
            except (OSError, FrameError) as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._came += data

    def __aiter__(self) -> "Attachment":
        """Iterate over what it writes, until it ends. Unavailable if its monitor dies."""
        return self

    async def __anext__(self) -> tuple[Channel, bytes]:
        """Return what it wrote next, and where."""
        while self.outcome is None:
            try:
                kind, data = await self.hear()
            except EOFError:
                raise Unavailable("the monitor of the container died; `lamina ps` tells more") from None
            if kind in _CHANNELS:
                return _CHANNELS[kind], data
            if kind == EXIT:
                self.outcome = parsed(data)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Leave."""
        self._connection.close()
        await trio.lowlevel.checkpoint()


async def _connect(folder: Path) -> Attachment:
    """Connect to a monitor. OSError if there is none."""
    # By descriptor: the path of a socket has 107 bytes at most (unix(7)).
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await connection.connect(f"/proc/self/fd/{opened}/attach")
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(opened)
    return Attachment(connection)


@asynccontextmanager
async def attach(folder: Path) -> AsyncIterator[Attachment]:
    """Give a connection to the container of a folder for the length of a block.

    FailedPrecondition if no monitor serves it: it has ended (`outcome`), or is unmonitored.
    """
    with os_errors(str(folder)):
        try:
            attachment = await _connect(folder)
        except (FileNotFoundError, ConnectionError):
            raise FailedPrecondition("the container does not run, or has no monitor any more") from None
    try:
        await attachment.say(frame(ATTACH))
        yield attachment
    finally:
        with trio.CancelScope(shield=True):
            await attachment.aclose()


async def ended(folder: Path) -> Outcome:
    """Wait until the container of a folder has ended, or nobody watches it; return what is known."""
    while True:
        with os_errors(str(folder)):
            try:
                attachment = await _connect(folder)
            except (FileNotFoundError, ConnectionError):
                found = await trio.to_thread.run_sync(outcome, folder)
                if found.ended or not found.monitored:
                    return found
                await trio.sleep(_POLL_S)  # it has only begun, or is about to end
                continue
        try:
            async for _ in attachment:
                pass
        except Unavailable:
            continue
        finally:
            await attachment.aclose()
        if attachment.outcome is not None:
            return attachment.outcome
