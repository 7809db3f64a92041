"""The terminal of whoever typed a command, while a container has it: raw, and afterwards as it was.

Sync. A container with a terminal of its own does all that this one would do with what is typed: echo,
lines, Ctrl-C. So each byte is passed on as it is, those that would be signals here among them.
"""

import os
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["DETACH_KEYS", "DetachKeys", "Size", "raw", "size_of"]

DETACH_KEYS = b"\x10\x11"
"""Ctrl-P Ctrl-Q: leave a container, which goes on; as in docker."""


class Size(NamedTuple):
    """Rows and columns of a terminal."""

    rows: int
    columns: int


@contextmanager
def raw(number: int) -> Iterator[None]:
    """Have the terminal of a descriptor pass on each byte until the end of the block, however that ends.

    What is no terminal, or not any more, stays as it is. What was typed before is not lost.
    """
    try:
        before = termios.tcgetattr(number)
        tty.setraw(number, termios.TCSANOW)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        try:
            termios.tcsetattr(number, termios.TCSANOW, before)  # waits for nobody to read what is left
        except termios.error:  # it was closed
            pass


def size_of(*numbers: int) -> Size | None:
    """Return the size of the first of some descriptors that is a terminal and has one."""
    for number in numbers:
        try:
            columns, rows = os.get_terminal_size(number)
        except OSError:
            continue
        if rows and columns:
            return Size(rows, columns)
    return None


class DetachKeys:
    """Finds the keys that leave a container in what is typed, however that comes in pieces."""

    def __init__(self) -> None:
        self._held = b""
        self.came = False

    def feed(self, typed: bytes) -> bytes:
        """Return what of this, and of what was held back, is for the container.

        The first of the keys is held back until it is seen what comes after it.
        """
        typed = self._held + typed
        self._held = b""
        before, keys, _ = typed.partition(DETACH_KEYS)
        if keys:
            self.came = True
        elif before.endswith(DETACH_KEYS[:1]):
            self._held = DETACH_KEYS[:1]
            before = before[:-1]
        return before
