"""What people and programs see: tables, JSON, messages, sizes and times.

Sync. Results go to stdout, messages to stderr. On a terminal a table fits, with short digests that every
command takes; elsewhere all is whole, as programs read it.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from tempfile import SpooledTemporaryFile
from textwrap import indent

import click
import msgspec

from engine.cli.table import SCREENFUL, Column, Fault, render
from engine.errors import printable
from engine.oci.short import short_forms
from engine.snapshots import Leftover

__all__ = [
    "View",
    "age",
    "counted",
    "document",
    "documents",
    "human_bytes",
    "resisting",
    "say",
    "short",
    "span",
    "write",
]


_IN_MEMORY = 1 << 24  # bytes of a document; what is longer waits in a file


@dataclass(frozen=True, slots=True)
class View:
    """How a command shows what it has to show: as JSON, briefly, or in whole."""

    json: bool = False
    quiet: bool = False
    no_trunc: bool = False

    def tell(self, message: str) -> None:
        """Write a line for people to stderr, where nothing else says it."""
        if not self.json and not self.quiet:
            say(message)

    @property
    def width(self) -> int | None:
        """Columns that a line may have; None where nobody looks at it, or all is asked for."""
        if self.no_trunc or not sys.stdout.isatty():
            return None
        return shutil.get_terminal_size().columns

    def shortener(self, names: Iterable[str]) -> Callable[[str], str]:
        """Return what shortens a digest so that it is told from all of `names`, where there is a width.

        Names that are no digests stay as they are.
        """
        if self.width is None:
            return str
        forms = short_forms(names)
        return lambda name: forms.get(name, name)

    def table(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[str]],
        faults: Iterable[Fault] = (),
        *,
        none: str,
    ) -> None:
        """Write a table as its rows come, or on stderr that there is `none` of it.

        `faults` are asked for once the rows are written.
        """
        left = iter(rows)
        first = list(islice(left, SCREENFUL))
        lines = render(columns, chain(first, left), faults, width=self.width)
        header = next(lines)
        if first:
            click.secho(header, bold=True)
            write(islice(lines, len(first)))
            sys.stdout.flush()  # who waits for them can read while the others are looked up
        if not write(lines) and not first:
            say(none)


def write(lines: Iterable[str]) -> int:
    """Write lines to stdout, as they come; return how many there were."""
    written = 0
    for line in lines:
        sys.stdout.write(f"{line}\n")
        written += 1
    return written


def document(value: object) -> None:
    """Write one JSON document to stdout, in ASCII: whatever the locale, it can be read."""
    write([_encoded(value)])


def documents(values: Iterable[object]) -> None:
    """Write one JSON document to stdout, the list of `values`, which need not fit into memory.

    It is written once all are there: after an error stdout has the document of that alone.
    """
    with SpooledTemporaryFile(_IN_MEMORY, mode="w+", encoding="ascii") as spool:
        opening = "[\n"
        for value in values:
            spool.write(opening + indent(_encoded(value), "  "))
            opening = ",\n"
        spool.write("[]\n" if opening == "[\n" else "\n]\n")
        spool.seek(0)
        shutil.copyfileobj(spool, sys.stdout)


def _encoded(value: object) -> str:
    return json.dumps(msgspec.to_builtins(value, enc_hook=str, str_keys=True), indent=2)


def say(message: str) -> None:
    """Write a line for people to stderr, if anybody can read it there."""
    try:
        sys.stderr.write(f"{printable(message, 4000)}\n")
        sys.stderr.flush()
    except OSError:
        pass  # closed or full: the exit code still tells


def resisting(left: Sequence[Leftover]) -> str:
    """Return a message on files that could not be deleted."""
    first, more = left[0], f", and {len(left) - 1} more" if len(left) > 1 else ""
    hint = " (lsattr shows immutable files)" if "permitted" in first.reason else ""
    return (
        f"removed, but files stay in {first.path} ({first.reason}){more}; "
        f"mend that{hint}, then run `lamina gc`"
    )


def short(digest: str) -> str:
    """Return the first 12 digits of a digest."""
    return digest.partition(":")[2][:12]


def counted(count: int, what: str) -> str:
    """Return a number of things, with their name in the plural unless it is one."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def human_bytes(count: float) -> str:
    """Return a size in the unit that suits it, powers of 1000 as disks and networks use."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(nanoseconds: int) -> str:
    """Return how long ago a time was, in one unit."""
    return f"{span(time.time_ns() - nanoseconds)} ago"


def span(nanoseconds: int) -> str:
    """Return a length of time in one unit."""
    passed = max(0, nanoseconds / 1e9)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed // size:.0f} {unit}"
    return f"{passed // 1:.0f} s"
