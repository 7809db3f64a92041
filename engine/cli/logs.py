"""The command `logs`.

Sync.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from engine.cli.completion import container_names
from engine.cli.context import Context
from engine.cli.naming import container_named
from engine.errors import InvalidArgument, printable
from engine.kv.schema import now
from engine.running.logs import LogFollower, LogLine, read_log
from engine.running.outcome import outcome
from engine.running.settling import SettledContainers
from engine.times import duration, moment, rfc3339

__all__ = ["logs"]

_LOOK_S = 0.05  # between two looks at a log that is followed


@click.command("logs")
@click.argument("word", metavar="CONTAINER", shell_complete=container_names)
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes, until it has ended.")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(0, sys.maxsize),
    metavar="N",
    help="Begin with the last N lines; else all.",
)
@click.option("--since", default="", metavar="TIME", help="Nothing before a moment, or an age as 10m.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was written.")
@click.pass_obj
def logs(
    context: Context, word: str, follow: bool, tail: int | None, since: str, timestamps: bool
) -> None:
    """Show what a container wrote; with --follow also what it writes.

    Its standard error goes to standard error. A log is bounded: what is oldest goes.
    """
    begin = _since(since) if since else 0
    with context.reading() as stores:
        folder = SettledContainers(stores.root, stores.namespace).folder(container_named(stores, word))
    lines = _followed if follow else read_log
    _show(lines(folder, tail=tail, since=begin), timestamps=timestamps)


def _since(text: str) -> int:
    """Return the time that a moment, an age or seconds since the epoch mean."""
    found = moment(text)
    age = duration(text)
    if found is None and text.isascii() and text.isdigit() and len(text) <= 12:
        found = int(text) * 10**9
    elif found is None and age is not None and age >= 0:
        found = now() - age
    if found is None:
        raise InvalidArgument(
            f"--since {printable(text)!r}: write a moment as 2030-01-31T12:00:00Z, or an age as 10m"
        )
    return found


def _followed(folder: Path, *, tail: int | None, since: int) -> Iterator[LogLine]:
    """Iterate over what is in a log, and what comes into it until nobody writes there any more."""
    follower = LogFollower(folder, tail=tail, since=since)
    try:
        is_over = False
        while True:
            lines = follower.more()
            yield from lines
            if not lines:
                sys.stdout.flush()
                if is_over:
                    return
                is_over = not outcome(folder).monitored  # then what it wrote last is there
                if not is_over:
                    time.sleep(_LOOK_S)
    finally:
        follower.close()


def _show(lines: Iterable[LogLine], *, timestamps: bool) -> None:
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    last = "stdout"
    is_new = dict.fromkeys(streams, True)
    for line in lines:
        if line.channel != last:
            streams[last].flush()  # both may be one terminal
            last = line.channel
        stamp = f"{rfc3339(line.at)} ".encode() if timestamps and is_new[last] else b""
        streams[last].write(stamp + line.data)
        is_new[last] = line.data.endswith(b"\n")
    streams["stderr"].flush()
