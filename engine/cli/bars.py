"""Shows how far work is while it goes on: bars on a terminal, elsewhere a line now and then.

Sync. All of it goes to stderr. Elsewhere, what is waited for is told at once, and how far an image is
each ten seconds, as podman and ctr users know it from logs; short work says nothing.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module

from engine.cli.drawing import summary
from engine.cli.output import View, say
from engine.observing.tally import Tally
from engine.progress import Report, Step, silent

__all__ = ["progress"]

_EVERY_S = 10.0


@contextmanager
def progress(view: View) -> Iterator[Report]:
    """Give a report that is shown until the end of the block."""
    if view.quiet:
        yield silent
        return
    with _drawn() or _logged(view) as report:
        yield report


def _drawn() -> AbstractContextManager[Report] | None:
    """Give what draws, None where nobody could see it."""
    if not sys.stderr.isatty():  # whatever FORCE_COLOR says
        return None
    # It loads rich, which takes as long as many a command.
    drawn: AbstractContextManager[Report] | None = import_module("engine.cli.screen").drawn()
    return drawn


@contextmanager
def _logged(view: View) -> Iterator[Report]:
    tally, told, is_over = Tally(), set[str](), threading.Event()

    def report(step: Step, item: str, total: int, done: int, /) -> None:
        tally(step, item, total, done)
        if step is Step.WAIT and item not in told:
            told.add(item)
            say(f"lamina: waiting: {item}")

    def log() -> None:
        while not is_over.wait(_EVERY_S):
            headway = tally.headway()
            if headway.parts:
                say(f"lamina: {summary(headway)}")

    thread = threading.Thread(target=log, name="progress", daemon=True)
    if not view.json:
        thread.start()
    try:
        yield report
    finally:
        is_over.set()
        if not view.json:
            thread.join()
