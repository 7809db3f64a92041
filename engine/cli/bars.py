"""Bars for work under way, on a terminal; elsewhere only what is waited for is told.

Sync.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn

from engine.cli.output import View, human_bytes, say, short
from engine.errors import printable
from engine.progress import Report, Step, silent

__all__ = ["progress"]

# Of other steps the item is a digest.
_BY_NAME = {Step.WAIT, Step.READ, Step.SWEEP, Step.COPY, Step.CHECK, Step.COUNT}
_COUNTED = {Step.FLUSH: "layers", Step.SWEEP: "records", Step.COUNT: "images"}


def _waits() -> Report:
    told: set[str] = set()

    def report(step: Step, item: str, _total: int, _done: int, /) -> None:
        if step is Step.WAIT and item not in told:
            told.add(item)
            say(f"lamina: waiting: {item}")

    return report


@contextmanager
def progress(view: View) -> Iterator[Report]:
    """Give a report that shows a bar for each thing under way; without a terminal only waits."""
    if view.quiet or not sys.stderr.isatty():
        yield silent if view.quiet else _waits()
        return
    columns = (
        TextColumn("{task.fields[step]:>10}"),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TransferSpeedColumn(),
    )
    screen = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    with Progress(*columns, console=screen, transient=True) as bars:
        tasks: dict[tuple[Step, str], Any] = {}

        def report(step: Step, item: str, total: int, done: int, /) -> None:
            key = (step, item)
            is_known = total > 0 or step is not Step.READ
            if step in _COUNTED:
                amount = f"{done} of {total} {_COUNTED[step]}"
            else:
                amount = human_bytes(done) + (f" of {human_bytes(total)}" if is_known else "")
            whole = total if is_known else None
            if key not in tasks:
                title = escape(printable(item)) if step in _BY_NAME else short(item)
                tasks[key] = bars.add_task(title, total=whole, step=step, amount=amount)
            bars.update(tasks[key], total=whole, completed=done, amount=amount)
            if whole is not None and done >= whole:
                bars.update(tasks[key], visible=False)

        yield report
