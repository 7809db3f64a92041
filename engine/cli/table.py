"""Tables for people: columns as wide as what is in them, which give way on a narrow terminal.

Sync. What identifies a row is never cut. Of the other columns the least important goes first, shortened
if that suffices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from engine.errors import printable

__all__ = ["Column", "Fault", "render"]

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
    rows: Sequence[Sequence[str]],
    faults: Sequence[Fault] = (),
    *,
    width: int | None,
) -> list[str]:
    """Return the lines of a table, the header first, for a terminal so wide, or for none."""
    cells = [[column.title for column in columns]]
    cells += [[printable(cell, _LONGEST) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        _fit(columns, widths, width)
    lines = [_line(columns, widths, row) for row in cells]
    first = widths[0] if rows else 0
    for fault in faults:
        name, error = printable(fault.name, _LONGEST), printable(fault.error, _LONGEST)
        lines.append(f"{name}{' ' * (first - cell_len(name))}{_GAP}{error}")
    return lines


def _fit(columns: Sequence[Column], widths: list[int], width: int) -> None:
    """Narrow the columns until they fit; those that have no room left become 0 wide."""
    giving = sorted((column.goes, at) for at, column in enumerate(columns) if column.goes)
    for _, at in giving:
        over = sum(wide + len(_GAP) for wide in widths if wide) - len(_GAP) - width
        if over <= 0:
            return
        least = columns[at].least
        if least and widths[at] - over >= max(least, cell_len(columns[at].title)):
            widths[at] -= over
        else:
            widths[at] = 0


def _line(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> str:
    shown = [
        _cell(cell, wide, right=column.right)
        for cell, wide, column in zip(row, widths, columns, strict=True)
        if wide
    ]
    return _GAP.join(shown).rstrip()


def _cell(text: str, wide: int, *, right: bool) -> str:
    if cell_len(text) > wide:
        text = set_cell_size(text, wide - 1) + "…"
    space = " " * (wide - cell_len(text))
    return space + text if right else text + space
