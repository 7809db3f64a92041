"""Connects whoever typed a command with a process in a container: what is typed, said and signalled.

Async. Whatever blocks does so on a thread, so that a reader who stalls holds up the process and nothing
else; a thread that blocks for ever ends with this process.
"""

import errno
import math
import os
import select
import signal
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from enum import Enum, auto
from typing import NamedTuple

import trio

from engine.cli.terminal import DetachKeys, raw, size_of
from engine.errors import FailedPrecondition, from_os_error
from engine.running.attaching import Attachment, Channel

__all__ = ["Leaving", "Left", "attend"]

_STDIN, _STDOUT, _STDERR = range(3)
_CHUNK = 1 << 16
_AHEAD = 1 << 18  # bytes; then the process waits until they are written
_STOPS = (signal.SIGINT, signal.SIGTERM)
_PASSED_ON = (*_STOPS, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 3  # signals that ask to end, with which a command ends whose process does not; as docker's


class Leaving(Enum):
    """Why nobody attends to a process any more."""

    ENDED = auto()
    """It said all that it had to say."""
    DETACHED = auto()
    """By the keys for that."""
    FORCED = auto()
    """It was asked to end again and again, and did not."""
    UNREAD = auto()
    """Nobody reads what it says."""
    HUNG_UP = auto()
    """The terminal was closed."""


class Left(NamedTuple):
    """How it came that nobody attends to a process any more."""

    why: Leaving
    signal: int = 0
    """What this command was asked to end with in the end."""


Kill = Callable[[int], Awaitable[object]]
"""Sends a signal to the process; FailedPrecondition once it has ended."""
Ended = Callable[[], Awaitable[object]]


async def attend(
    attachment: Attachment, kill: Kill, ended: Ended, *, stdin: bool, terminal: bool
) -> Left:
    """Pass on what is typed, said and signalled until the process has said all; return why that ended.

    With `stdin` it reads what comes here. With `terminal` it has one of its own, which takes the size of
    the one here; with both it gets each byte that is typed, Ctrl-C among them, and Ctrl-P Ctrl-Q leaves
    it alone. Signals are passed on by `kill`; what was ignored when this command began stays so. `ended`
    waits for the process's end.
    """
    has_keys = stdin and terminal
    attending = _Attending(attachment, kill, ended, DetachKeys() if has_keys else None)
    with raw(_STDIN) if has_keys else nullcontext():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attending.pass_signals_on)
            if terminal:
                nursery.start_soon(attending.follow_size)
            if stdin:
                nursery.start_soon(attending.pass_input_on)
            nursery.start_soon(attending.pass_output_on)
            await attending.over.wait()
            nursery.cancel_scope.cancel()
    return attending.left


class _Attending:
    def __init__(
        self, attachment: Attachment, kill: Kill, ended: Ended, keys: DetachKeys | None
    ) -> None:
        self._attachment = attachment
        self._kill = kill
        self._ended = ended
        self._has_ended = False
        self._ahead = 0  # bytes that are here and not yet written
        self._room = trio.Event()
        self._keys = keys
        self.over = trio.Event()
        self.left = Left(Leaving.ENDED)

    def _leave(self, why: Leaving, number: int = 0) -> None:
        if not self.over.is_set():
            self.left = Left(why, number)
            self.over.set()

    async def pass_output_on(self) -> None:
        """Write what the process says; what is left of it once it has ended is fetched first.

        It waits for a reader who stalls. Its monitor does not, when it has ended: not for long.
        """
        send, receive = trio.open_memory_channel[tuple[int, bytes]](math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch, send)
            nursery.start_soon(self._notice_end)
            async for number, data in receive:
                await self._write(number, data)
                self._ahead -= len(data)
                if self._ahead < _AHEAD:
                    self._room.set()
            nursery.cancel_scope.cancel()
        self._leave(Leaving.ENDED)

    async def _fetch(self, send: trio.MemorySendChannel[tuple[int, bytes]]) -> None:
        async with send:
            async for channel, data in self._attachment:
                await send.send((_STDERR if channel is Channel.STDERR else _STDOUT, data))
                self._ahead += len(data)
                if self._ahead >= _AHEAD and not self._has_ended:
                    self._room = trio.Event()
                    await self._room.wait()

    async def _notice_end(self) -> None:
        await self._ended()
        self._has_ended = True
        self._room.set()

    async def _write(self, number: int, data: bytes) -> None:
        try:
            await trio.to_thread.run_sync(_write, number, data, abandon_on_cancel=True)
        except BrokenPipeError:
            if number == _STDOUT:
                self._leave(Leaving.UNREAD)
        except OSError as error:
            if error.errno != errno.EIO:
                name = "standard output" if number == _STDOUT else "standard error"
                raise from_os_error(error, name) from error
            await self._hang_up()

    async def pass_input_on(self) -> None:
        while data := await _read():
            passed = self._keys.feed(data) if self._keys else data
            if passed:
                await self._attachment.send(passed)
            if self._keys and self._keys.came:
                self._leave(Leaving.DETACHED)
                return
        if self._keys:  # what is typed at a terminal that is raw comes to no other end
            await self._hang_up()
        else:
            await self._attachment.close_stdin()

    async def _hang_up(self) -> None:
        """Tell the process that the terminal is gone, and leave it."""
        await self._pass_on(signal.SIGHUP)
        self._leave(Leaving.HUNG_UP, signal.SIGHUP)

    async def pass_signals_on(self) -> None:
        heard = [n for n in _PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]
        asked = 0
        with trio.open_signal_receiver(*heard) as received:
            async for number in received:
                await self._pass_on(number)
                asked += number in _STOPS
                if asked >= _PATIENCE:
                    self._leave(Leaving.FORCED, number)

    async def _pass_on(self, number: int) -> None:
        try:
            await self._kill(number)
        except FailedPrecondition:  # it has ended
            pass

    async def follow_size(self) -> None:
        with trio.open_signal_receiver(signal.SIGWINCH) as received:
            await self._tell_size()
            async for _ in received:
                await self._tell_size()

    async def _tell_size(self) -> None:
        size = size_of(_STDOUT, _STDIN)
        if size:
            await self._attachment.resize(size.rows, size.columns)


async def _read() -> bytes:
    """Return what comes on standard input; nothing at its end.

    Nothing is taken from it before it is wanted: what is left is for whoever reads there next.
    """
    try:
        await trio.lowlevel.wait_readable(_STDIN)
    except OSError as error:
        if error.errno != errno.EPERM:  # a file can always be read
            raise
    return await trio.to_thread.run_sync(_read_some, abandon_on_cancel=True)


def _read_some() -> bytes:
    while True:
        try:
            return os.read(_STDIN, _CHUNK)
        except BlockingIOError:  # it does not block, as somebody else wants it, and was read by them
            select.select([_STDIN], [], [])
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal was closed, or is another's
                return b""
            raise from_os_error(error, "standard input") from error


def _write(number: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(number, left) :]
        except BlockingIOError:
            select.select([], [number], [])
