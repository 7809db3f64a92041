"""What every command needs: the store that the options name, and options that several share.

Sync.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from engine.cli.output import View
from engine.errors import InvalidArgument
from engine.filters import Filter, check_expressions, parse_all
from engine.oci.platform import Platform, parse_platform
from engine.snapshots import Durability
from engine.stores import Stores, host_platform, open_stores

__all__ = [
    "REAPER",
    "Command",
    "Context",
    "action",
    "default_root",
    "durability_option",
    "filter_option",
    "lease_option",
    "limit_rate_option",
    "listing",
    "platform_option",
    "replace_option",
    "snapshotter_option",
]

REAPER = "lamina.reaper"
"""What click knows the reaper by that a command was given ahead (`engine.running.reaping`)."""

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Context:
    """The global options."""

    root: Path
    namespace: str

    def stores(self) -> AbstractContextManager[Stores]:
        """Open the stores, which must exist, for commands that do one quick thing."""
        return open_stores(self.root, self.namespace, host_platform(), create=False)

    def reading(self) -> AbstractContextManager[Stores]:
        """Open the stores, which must exist, for commands that change nothing."""
        return open_stores(self.root, self.namespace, host_platform(), readonly=True)


def default_root() -> Path:
    """Return the store that is used where none is named."""
    if os.geteuid() == 0:
        return Path("/var/lib/lamina")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    if data.startswith("~"):
        raise InvalidArgument("no home folder is known; name the store with --root")
    return Path(data) / "lamina"


def _platform(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Platform | None:
    return parse_platform(text) if text else None


def _filters(
    _context: click.Context, _parameter: click.Parameter, texts: Sequence[str]
) -> tuple[Filter, ...]:
    filters = parse_all(texts)
    check_expressions(filters)
    return filters


def _rate(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """Return the bytes a second that a text means; as curl and wget have it, K is 1024."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([kmg]?)", text, re.ASCII | re.IGNORECASE)
    rate = float(found[1]) * 1024 ** " kmg".index(found[2].lower() or " ") if found else 0
    if rate < 1:
        raise click.BadParameter(f"{text!r} is no number of bytes a second, as 500K, 2.5M or 1G")
    return rate


_json = click.option("--json", "as_json", is_flag=True, help="Write one JSON document.")
_whole = click.option("--no-trunc", is_flag=True, help="Show all columns, and digests whole.")


def listing(command: Command) -> Command:
    """Give a command that lists things the options for how, as its argument `view`."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="Only names, one on a line.")
    return _json(quiet(_whole(_viewed(command))))


def action(command: Command) -> Command:
    """Give a command that does something the options for what it says, as its argument `view`."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
    return _json(quiet(_viewed(command)))


def _viewed(command: Command) -> Command:
    @wraps(command)
    def viewed(
        *args: object, as_json: bool, quiet: bool, no_trunc: bool = False, **options: object
    ) -> object:
        return command(*args, view=View(as_json, quiet, no_trunc), **options)

    return viewed


filter_option = click.option(
    "--filter",
    "filters",
    callback=_filters,
    metavar="FILTER",
    multiple=True,
    help="Only what matches, as in containerd: FIELD==VALUE,…; given again, either.",
)
lease_option = click.option(
    "--lease", metavar="ID", default="", help="Also have this lease hold it (`lamina leases create`)."
)
snapshotter_option = click.option(
    "--snapshotter", metavar="NAME", help="Backend; `lamina backends` lists them."
)
platform_option = click.option(
    "--platform", callback=_platform, metavar="OS/ARCH", help="Of a multi-platform image."
)
durability_option = click.option(
    "--durability",
    type=click.Choice([str(one) for one in Durability]),
    default=str(Durability.FULL),
    help="With lazy the kernel flushes layers; after a power cut they are checked.",
)
limit_rate_option = click.option(
    "--limit-rate",
    callback=_rate,
    metavar="RATE",
    help="Bytes of layers a second at most; K, M and G are 1024-fold.",
)
replace_option = click.option("--replace", is_flag=True, help="Let a name move to another image.")
