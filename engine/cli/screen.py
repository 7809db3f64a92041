"""Bars on a terminal.

Sync.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from engine.cli.drawing import lines
from engine.observing.tally import Tally
from engine.progress import Report

__all__ = ["drawn"]

_A_SECOND = 8  # pictures; a terminal far away takes those


def drawn() -> AbstractContextManager[Report] | None:
    """Give what draws on stderr for the length of a block, None if that can show text alone."""
    screen = Console(stderr=True, highlight=False, markup=False, emoji=False)
    return None if screen.is_dumb_terminal else _drawn(screen)


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
