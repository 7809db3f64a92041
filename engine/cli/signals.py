"""Signals that ask a command to end: Ctrl-C, and SIGTERM and SIGHUP, which clean up as it does.

Sync. What was ignored when the command began, as by nohup(1), stays ignored. Long work is ended by the
first: more of them are ignored, as they would break off what cleans up after it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "handled", "leave_at_once", "raising", "restore"]

_STOPS = (signal.SIGTERM, signal.SIGHUP)
_ALL = (signal.SIGINT, *_STOPS)
_MESSAGES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Stopped(KeyboardInterrupt):
    """A signal came; not an error of the command's."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(_MESSAGES[signal.Signals(number)])
        self.exit_code = 128 + number


def _set(
    numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], object] | signal.Handlers
) -> None:
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave_at_once() -> None:
    """End with one line when a signal comes: while there is nothing to clean up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        try:
            os.write(2, f"lamina: {_MESSAGES[signal.Signals(number)]}\n".encode())
        finally:
            os._exit(128 + number)

    _set(_ALL, leave)


def raising() -> None:
    """Let a signal be an exception from now on."""
    _set((signal.SIGINT,), signal.default_int_handler)  # that one trio knows
    _set(_STOPS, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def restore() -> None:
    """Let a signal end the process, as where nothing handles it."""
    _set(_ALL, signal.SIG_DFL)


@contextmanager
def handled(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with a signal's number in the block, where an exception could break an event loop.

    Ctrl-C too: trio would raise it in whatever task runs, and one that serves several callers ends the
    loop with that.
    """
    before = {number: signal.getsignal(number) for number in _ALL}

    def handle(number: int, _frame: FrameType | None) -> None:
        _set(_ALL, signal.SIG_IGN)
        stop(number)

    _set(_ALL, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
