"""What people and programs see: tables, JSON, sizes, progress bars.

Sync. Results go to stdout, progress and messages to stderr; bars only on a terminal.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

from engine.errors import printable
from engine.progress import Report, Step
from engine.snapshots import Leftover

__all__ = [
    "Tree",
    "age",
    "console",
    "escape",
    "human_bytes",
    "print_json",
    "print_table",
    "progress",
    "resisting",
    "say",
    "short",
]

# A pipe has no width: rich would cut lines at 80. Names are shown as they are: `:ox:` is no ox.
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 1000)
_messages = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Write one JSON document to stdout."""
    data = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2)
    sys.stdout.write(data.decode() + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a plain table to stdout; column widths fit, nothing is cut off."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*(escape(printable(cell, 1000)) for cell in row))
    console.print(table)


def say(message: str) -> None:
    """Write a line for people to stderr."""
    _messages.print(escape(printable(message, 4000)))


def resisting(left: Sequence[Leftover]) -> str:
    """Return a message on files that could not be deleted."""
    first, more = left[0], f", and {len(left) - 1} more" if len(left) > 1 else ""
    return (
        f"removed, but files stay in {first.path} ({first.reason}){more}; "
        "mend that (lsattr shows immutable files), then run `lamina gc`"
    )


def short(digest: str) -> str:
    """Return the first 12 digits of a digest."""
    return digest.partition(":")[2][:12]


def human_bytes(count: float) -> str:
    """Return a size in the unit that suits it, powers of 1000 as disks and networks use."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(nanoseconds: int) -> str:
    """Return how long ago a time was, in one unit."""
    passed = max(0, (datetime.now(UTC).timestamp() - nanoseconds / 1e9))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return f"{passed:.0f} s ago"


def _waits() -> Report:
    told: set[str] = set()

    def report(step: Step, item: str, _total: int, _done: int, /) -> None:
        if step is Step.WAIT and item not in told:
            told.add(item)
            say(f"lamina: waiting: {item}")

    return report


@contextmanager
def progress() -> Iterator[Report]:
    """Give a report that shows a bar for each thing under way; without a terminal only waits."""
    if not sys.stderr.isatty():
        yield _waits()
        return
    columns = (
        TextColumn("{task.fields[step]:>10}"),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=_messages, transient=True) as bars:
        tasks: dict[tuple[Step, str], Any] = {}

        def report(step: Step, item: str, total: int, done: int, /) -> None:
            key = (step, item)
            amount = (
                f"{done} of {total} layers"
                if step is Step.FLUSH
                else f"{human_bytes(done)} of {human_bytes(total)}"
            )
            if key not in tasks:
                title = escape(printable(item)) if step is Step.WAIT else short(item)
                tasks[key] = bars.add_task(title, total=total, step=step, amount=amount)
            bars.update(tasks[key], completed=done, amount=amount)
            if done >= total:
                bars.update(tasks[key], visible=False)

        yield report
