"""Shows where the time of an import or unpack went, with `--timings`.

Sync.
"""

from collections.abc import Callable
from typing import TypeVar

import click

from engine.cli.output import View
from engine.phases import Timings

__all__ = ["tell_timings", "timings_option"]

F = TypeVar("F", bound=Callable[..., object])


def timings_option(command: F) -> F:
    """Add the option to a command."""
    return click.option("--timings", is_flag=True, help="Show where the time went.")(command)


def tell_timings(view: View, timings: Timings) -> None:
    """Write a line for each phase to stderr."""
    view.tell(f"{'phase':<8} {'busy':>9} {'waiting':>9}")
    for phase, spent in timings.items():
        view.tell(f"{phase:<8} {spent.busy:>7.2f} s {spent.waiting:>7.2f} s")
