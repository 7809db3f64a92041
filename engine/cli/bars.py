"""Shows how far work is while it goes on: bars on a terminal, elsewhere a line now and then.

Sync. All of it goes to stderr. Elsewhere, what is waited for is told at once, and how far an image is
each ten seconds, as podman and ctr users know it from logs; short work says nothing.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from engine.cli.drawing import lines, summary
from engine.cli.output import View, say
from engine.progress import Report, Step, silent
from engine.tally import Tally

__all__ = ["progress"]

_EVERY_S = 10.0
_A_SECOND = 8  # pictures; a terminal far away takes those


@contextmanager
def progress(view: View) -> Iterator[Report]:
    """Give a report that is shown until the end of the block."""
    if view.quiet:
        yield silent
        return
    screen = Console(stderr=True, highlight=False, markup=False, emoji=False)
    is_drawn = sys.stderr.isatty() and not screen.is_dumb_terminal  # whatever FORCE_COLOR says
    with _drawn(screen) if is_drawn else _logged(view) as report:
        yield report


@contextmanager
def _drawn(screen: Console) -> Iterator[Report]:
    tally = Tally()
    bar = "#-" if screen.options.ascii_only else "━─"

    def picture() -> Text:
        width, height = screen.size
        text = "\n".join(lines(tally.headway(), width, height, bar))
        return Text(text, no_wrap=True, overflow="crop")

    # What others write to stdout is not ours to touch: it may be a document.
    with Live(
        get_renderable=picture,
        console=screen,
        refresh_per_second=_A_SECOND,
        transient=True,
        redirect_stdout=False,
    ):
        yield tally


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
