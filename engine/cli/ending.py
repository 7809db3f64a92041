"""How a command ends: an error as one line, as JSON, and as an exit code.

Sync. 0 done, 1 other failure, 2 usage, 3 not found, 4 exists already, 5 corrupt or refused input,
6 wrong state, 7 unavailable, 8 no space; 126 for a container's command that cannot be executed, 127 for
one that is not there; 128 and a signal's number when one ended it, as a shell has it.
"""

import errno
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from engine.cli.output import document, say
from engine.cli.signals import Stopped
from engine.errors import (
    AlreadyExists,
    CommandFailed,
    DataLoss,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Refused,
    ResourceExhausted,
    Unavailable,
    from_os_error,
    printable,
)

__all__ = ["Incomplete", "end", "exit_code"]

_CODES: tuple[tuple[type[EngineError], int], ...] = (
    (InvalidArgument, 2),
    (NotFound, 3),
    (AlreadyExists, 4),
    (Refused, 5),
    (DataLoss, 5),
    (FailedPrecondition, 6),
    (Unavailable, 7),
    (ResourceExhausted, 8),
)


class Incomplete(Exception):
    """An error after which there is still something to show: what was done, or found, before it."""

    def __init__(self, error: EngineError, shown: Mapping[str, Any]) -> None:
        super().__init__(str(error))
        self.error = error
        self.shown = shown


def exit_code(error: EngineError) -> int:
    """Return the exit code that stands for an error."""
    if isinstance(error, CommandFailed):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def end(error: BaseException, *, as_json: bool) -> int:
    """Tell how a command failed, and return its exit code; what is a bug is raised again."""
    shown: Mapping[str, Any] = {}
    error = _first(error)
    if isinstance(error, Incomplete):
        shown = error.shown
        error = error.error
    if isinstance(error, BrokenPipeError):
        # The reader of our output left, as `head` does; nothing more can be written there.
        _drop_output()
        return 0
    kind, message, code = _told(error)
    say(f"lamina: {message}")
    try:
        if as_json:
            about = {"kind": kind, "message": printable(message, 4000), "exit_code": code}
            document({**shown, "error": about})
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return code


def _first(error: BaseException) -> BaseException:
    """Return what counts of tasks that ran together: an interrupt, or else the first to fail."""
    while isinstance(error, BaseExceptionGroup):
        error = min(error.exceptions, key=lambda inner: not _is_stop(inner))
    return error


def _is_stop(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_stop, error.exceptions))
    return isinstance(error, KeyboardInterrupt)


def _told(error: BaseException) -> tuple[str, str, int]:
    """Return the kind of an error, its message and its exit code."""
    if isinstance(error, EngineError):
        return _kind(error), str(error), exit_code(error)
    if isinstance(error, click.ClickException):
        # In one line, as all errors are.
        message = " ".join(error.format_message().split()).rstrip(".")
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"; see `{context.command_path} --help`" if context else ""
        return InvalidArgument.__name__, message + hint, error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        stopped = error if isinstance(error, Stopped) else Stopped()
        return Stopped.__name__, str(stopped), stopped.exit_code
    if isinstance(error, MemoryError):
        return _told(from_os_error(OSError(errno.ENOMEM, ""), "lamina"))
    if isinstance(error, OSError):
        return _told(from_os_error(error, _place(error)))
    if isinstance(error, UnicodeError):
        return _told(InvalidArgument("a name here is not UTF-8; lamina's own names must be"))
    raise error


def _kind(error: EngineError) -> str:
    """Return the kind of an error under the name that `engine.errors` has for it."""
    known = (kind for kind in type(error).__mro__ if kind.__module__ == EngineError.__module__)
    return next(known).__name__


def _place(error: OSError) -> str:
    """Return what an error was about that no part of the engine told of."""
    if isinstance(error.filename, str | bytes):
        return printable(error.filename)
    return "the working folder" if error.errno == errno.ENOENT else "standard output"


def _drop_output() -> None:
    """Let what is still to be written go nowhere: else the interpreter tries again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
