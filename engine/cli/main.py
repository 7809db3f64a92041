"""The command `lamina`: its options, its errors as one line and an exit code.

Exit codes: 0 done, 1 other failure, 2 usage, 3 not found, 4 exists already, 5 corrupt or refused
input, 6 wrong state, 7 unavailable, 8 no space, 130 interrupted.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from engine import failpoints
from engine.cli import content, demo, images, importing, mounts, snapshots, store
from engine.cli.context import Context
from engine.cli.output import say
from engine.errors import (
    AlreadyExists,
    DataLoss,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Refused,
    ResourceExhausted,
    Unavailable,
)

__all__ = ["exit_code", "main"]

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


def exit_code(error: EngineError) -> int:
    """Return the exit code that stands for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def _default_root() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/lamina")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "lamina"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--root",
    type=click.Path(path_type=Path, readable=False),
    default=_default_root,
    help="Folder of the store.",
    show_default="/var/lib/lamina, or ~/.local/share/lamina when not root",
)
@click.option("--namespace", default="default", show_default=True, help="Whose objects to use.")
@click.version_option(package_name="lamina")
@click.pass_context
def lamina(context: click.Context, root: Path, namespace: str) -> None:
    """Container images into mounted root file systems."""
    context.obj = Context(root, namespace)


for group in (importing, images, mounts, content, snapshots, store, demo):
    for command in group.COMMANDS:
        lamina.add_command(command)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(_guarded(_run))


def _run() -> int:
    code = 0
    try:
        # Not click's `main`: it has ways of its own with an interrupt and with a closed pipe.
        with lamina.make_context("lamina", sys.argv[1:]) as context:
            lamina.invoke(context)
    except click.exceptions.Exit as done:  # after --help and --version
        code = done.exit_code
    sys.stdout.flush()  # here, where a failure is still explained
    return code


class _Waiting(logging.Handler):
    """Shows that the store is being waited for: nothing else would tell."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        say(f"lamina: {record.getMessage()}")


def _guarded(run: Callable[[], int]) -> int:
    try:
        logging.getLogger().addHandler(logging.NullHandler())  # stderr is for one line, the error
        logging.getLogger("engine.kv.turn").addHandler(_Waiting())
        failpoints.arm(os.environ.get("LAMINA_FAILPOINTS", ""))
        return run()
    except BaseException as error:  # noqa: BLE001  the one place that turns errors into codes
        return _explain(error)


def _explain(error: BaseException) -> int:
    if isinstance(error, BaseExceptionGroup):
        # Tasks that ran together: an interrupt counts most, then the first to fail.
        inner = sorted(error.exceptions, key=lambda e: not isinstance(e, KeyboardInterrupt))
        return _explain(inner[0])
    if isinstance(error, EngineError):
        say(f"lamina: {error}")
        return exit_code(error)
    if isinstance(error, click.ClickException):
        _show(error)
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        say("lamina: interrupted")
        return 130
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        # The reader of our output left, as `head` does; nothing more can be written there. Rich
        # makes an exit of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    raise error


def _show(error: click.ClickException) -> None:
    """Tell what click has to say in one line, as all errors are; help is shown whole."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    say(f"lamina: {message}" + (f"; see `{context.command_path} --help`" if context else ""))
