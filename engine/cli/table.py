"""Tables for people: columns as wide as what is in them, which give way on a narrow terminal.

Sync. What identifies a row is never cut. Of the other columns the least important goes first, shortened
if that suffices. A long table is written as its rows come: the first screenful settles the columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from engine.errors import printable

__all__ = ["SCREENFUL", "Column", "Fault", "render"]

SCREENFUL = 50
"""Rows that settle how wide the columns are."""

_GAP = "  "
_LONGEST = 1000  # of a cell: an image may have written it


@dataclass(frozen=True, slots=True)
class Column:
    """A column: `goes` is its turn to give way, from 1; 0 is for what identifies a row.

    One with `least` may be shortened to so many characters before it is left out.
    """

    title: str
    goes: int = 0
    least: int = 0
    right: bool = False


class Fault(NamedTuple):
    """A row of which only its name can be told, and why."""

    name: str
    error: str


def render(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    faults: Iterable[Fault] = (),
    *,
    width: int | None,
) -> Iterator[str]:
    """Yield the lines of a table, the header first, for a terminal so wide, or for none.

    A cell that is wider than all in the first screenful widens its column from there on, where there is
    room. `faults` come last, and are asked for then.
    """
    cells = ([printable(cell, _LONGEST) for cell in row] for row in rows)
    titles = [column.title for column in columns]
    first = list(islice(cells, SCREENFUL))
    widths = [max(map(_wide, column)) for column in zip(titles, *first, strict=True)]
    if width is not None:
        _fit(columns, widths, width)
    yield _line(columns, widths, titles)
    for row in chain(first, cells):
        _widen(columns, widths, row, width)
        yield _line(columns, widths, row)
    name_wide = widths[0] if first else 0
    for fault in faults:
        name, error = printable(fault.name, _LONGEST), printable(fault.error, _LONGEST)
        yield f"{name}{' ' * (name_wide - _wide(name))}{_GAP}{error}"


def _fit(columns: Sequence[Column], widths: list[int], width: int) -> None:
    """Narrow the columns until they fit; those that have no room left become 0 wide."""
    giving = sorted((column.goes, at) for at, column in enumerate(columns) if column.goes)
    for _, at in giving:
        over = _total(widths) - width
        if over <= 0:
            return
        least = columns[at].least
        if least and widths[at] - over >= max(least, _wide(columns[at].title)):
            widths[at] -= over
        else:
            widths[at] = 0


def _wide(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)  # which is slow where no two are alike


def _total(widths: Sequence[int]) -> int:
    return sum(wide + len(_GAP) for wide in widths if wide) - len(_GAP)


def _widen(columns: Sequence[Column], widths: list[int], row: Sequence[str], width: int | None) -> None:
    """Make the columns that are shown as wide as a row, where that fits; one that must be whole is."""
    for at, cell in enumerate(row):
        more = _wide(cell) - widths[at]
        if more > 0 and widths[at]:
            has_room = width is None or _total(widths) + more <= width
            widths[at] += more if has_room or not columns[at].goes else 0


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    shown = [
        _cell(cell, wide, right=column.right)
        for cell, wide, column in zip(row, widths, columns, strict=True)
        if wide
    ]
    return _GAP.join(shown).rstrip()


def _cell(text: str, wide: int, *, right: bool) -> str:
    if _wide(text) > wide:
        text = set_cell_size(text, wide - 1) + "…"
    space = " " * (wide - _wide(text))
    return space + text if right else text + space
