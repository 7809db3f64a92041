"""The command `lamina`: what must hold before anything else is loaded; the rest is in `program`.

Loading takes a quarter of a second, in which a signal must not end in a traceback. A program that was
started with a standard stream closed would give its number to the next file that it opens, such as the
store's, and write messages into that.
"""

import gc
import os
import sys
from importlib import import_module
from io import TextIOWrapper

from engine.cli import signals

__all__ = ["main"]

_GARBAGE_AT = 50_000  # objects: what loading makes stays, and is looked through again and again in vain


def main() -> None:
    """Run the command line and end the process."""
    gc.set_threshold(_GARBAGE_AT)
    signals.leave_at_once()
    _fill_streams()
    code = import_module("engine.cli.program").run()
    signals.restore()
    os._exit(code)  # all is closed and flushed; to take down module by module takes 40 ms


def _fill_streams() -> None:
    """Open what is closed, so that writing to a closed stdout is an error and to a stderr is not."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    sys.stdout = sys.stdout or _writer(1)
    sys.stderr = sys.stderr or _writer(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know all characters


def _writer(number: int) -> TextIOWrapper:
    return open(number, "w", encoding="utf-8", closefd=False)
