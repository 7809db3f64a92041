"""Words of a command line that say how a container is run: sizes, environment, folders, labels.

Sync. They mean what they mean to docker and podman. What is only a word there, such as a volume with a
name, is refused with what to write here.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import isfinite
from typing import Any

import click

from engine.cli.context import Command
from engine.cli.terminal import size_of
from engine.errors import InvalidArgument, printable
from engine.oci.signals import parse_signal
from engine.running.options import Bind, Network, Resources, RunOptions

__all__ = [
    "check_terminal",
    "environment_option",
    "parse_bind",
    "parse_bytes",
    "parse_environment",
    "parse_labels",
    "run_options",
    "stdin_option",
    "storage_option",
    "terminal_option",
    "user_option",
    "workdir_option",
]

_UNITS = " kmgtp"
_BYTES = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmgtp]?)i?b?", re.ASCII | re.IGNORECASE)
_LEAST_MEMORY = 6 << 20  # bytes: with less the runtime itself is killed before it gets to the command
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", re.ASCII)


def parse_bytes(text: str) -> int:
    """Return the bytes that a text means, such as 512m or 1.5g; units are 1024-fold, as docker's."""
    found = _BYTES.fullmatch(text)
    count = int(float(found[1]) * 1024 ** _UNITS.index(found[2].lower() or " ")) if found else 0
    if not 0 < count < 1 << 63:
        raise InvalidArgument(f"{printable(text)!r} is no size; write bytes, or as 512m and 1.5g")
    return count


def parse_environment(words: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """Return `KEY=VALUE` for each word; of a KEY alone the value is what is `known`.

    As with docker, a KEY alone that nobody knows says nothing.
    """
    found = []
    for word in words:
        key, is_given, _ = word.partition("=")
        if not key:
            raise InvalidArgument(f"{printable(word)!r} is no variable; write KEY=VALUE, or KEY")
        if is_given:
            found.append(word)
        elif key in known:
            found.append(f"{key}={known[key]}")
    return tuple(found)


def parse_bind(word: str) -> Bind:
    """Return the file or folder of the host's that `SRC:DST[:ro]` names. Raises InvalidArgument."""
    source, _, rest = word.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target.startswith("/") or mode not in {"", "ro", "rw"}:
        raise InvalidArgument(
            f"-v {printable(word)!r}: write SRC:DST, with an absolute path as DST, or SRC:DST:ro"
        )
    if "/" not in source and source not in {".", ".."}:
        raise InvalidArgument(
            f"-v {printable(word)!r}: there are no volumes with names; name a folder, "
            f"as ./{printable(source)}"
        )
    if not os.path.exists(source):
        raise InvalidArgument(f"-v {printable(word)!r}: there is no {printable(source)}; make it first")
    if os.path.normpath(target).strip("/") == "":
        raise InvalidArgument(f"-v {printable(word)!r}: nothing can be mounted at / itself")
    return Bind(source=os.path.abspath(source), target=os.path.normpath(target), readonly=mode == "ro")


def parse_labels(words: Sequence[str]) -> dict[str, str]:
    """Return labels by key; as with docker, a KEY alone has an empty value."""
    found = {}
    for word in words:
        key, _, value = word.partition("=")
        if not key:
            raise InvalidArgument(f"{printable(word)!r} is no label; write KEY=VALUE")
        found[key] = value
    return found


def check_terminal(*, stdin: bool, terminal: bool) -> None:
    """Raise InvalidArgument unless there is a terminal here, if what is typed goes to another."""
    if stdin and terminal and not os.isatty(0):
        raise InvalidArgument("-t with -i: standard input is no terminal; leave -t out for a pipe")


def _parsed(parse: Callable[[Any], object]) -> Callable[..., Any]:
    """Return a callback of click's that leaves alone what was not given."""

    def callback(_context: click.Context, _parameter: click.Parameter, given: Any) -> object:  # noqa: ANN401
        return given if given is None else parse(given)

    return callback


def _environment(words: Sequence[str]) -> tuple[str, ...]:
    return parse_environment(words, os.environ)


def _binds(words: Sequence[str]) -> tuple[Bind, ...]:
    return tuple(map(parse_bind, words))


def _memory(word: str) -> int:
    size = parse_bytes(word)
    if size < _LEAST_MEMORY:
        raise InvalidArgument(f"--memory {printable(word)}: a container needs 6m at least")
    return size


def _storage(words: Sequence[str]) -> int:
    size = 0
    for word in words:
        key, _, value = word.partition("=")
        if key != "size":
            raise InvalidArgument(f"--storage-opt {printable(word)}: there is only size=SIZE")
        size = parse_bytes(value)
    return size


def _cpus(count: float) -> float:
    if not (isfinite(count) and count >= 0.01):
        raise InvalidArgument(f"--cpus {count:g}: write how many, 0.01 at least, as 1.5")
    return count


def _pids(count: int) -> int:
    if count < -1:
        raise InvalidArgument(f"--pids-limit {count}: write how many, or -1 for no limit")
    return max(0, count)


def _hostname(word: str) -> str:
    if not _HOSTNAME.fullmatch(word):
        raise InvalidArgument(f"{printable(word)!r} is no host name; use letters, digits, - and dots")
    return word


def _workdir(word: str) -> str:
    if not word.startswith("/"):
        raise InvalidArgument(f"{printable(word)!r} is no absolute path")
    return word


def _stop_signal(word: str) -> str:
    parse_signal(word)
    return word


stdin_option = click.option(
    "-i", "--interactive", "stdin", is_flag=True, help="Pass standard input on; else it is empty."
)
terminal_option = click.option("-t", "--tty", "terminal", is_flag=True, help="Give it a terminal.")
environment_option = click.option(
    "-e",
    "--env",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parsed(_environment),
    help="Set a variable; KEY alone takes it over from here.",
)
user_option = click.option(
    "-u", "--user", default="", metavar="USER[:GROUP]", help="By name or number; else as the image says."
)
storage_option = click.option(
    "--storage-opt",
    "quota",
    multiple=True,
    metavar="size=SIZE",
    callback=_parsed(_storage),
    help="What it may write, where the file system has project quotas.",
)
workdir_option = click.option(
    "-w", "--workdir", metavar="PATH", callback=_parsed(_workdir), help="Folder to start in."
)

_OPTIONS = (
    stdin_option,
    terminal_option,
    environment_option,
    click.option(
        "-v",
        "--volume",
        "binds",
        multiple=True,
        metavar="SRC:DST[:ro]",
        callback=_parsed(_binds),
        help="Have a file or folder of the host's in it.",
    ),
    workdir_option,
    user_option,
    click.option("--entrypoint", metavar="PROGRAM", help='In place of the image\'s; "" for none.'),
    click.option("--read-only", is_flag=True, help="Nothing in its root file system can be written."),
    click.option(
        "--network",
        "--net",
        type=click.Choice([str(one) for one in Network]),
        default=str(Network.NONE),
        show_default=True,
        help="none: a loopback interface and nothing else; host: the host's.",
    ),
    click.option(
        "--hostname", metavar="NAME", callback=_parsed(_hostname), help="What it calls itself."
    ),
    click.option(
        "-m", "--memory", metavar="SIZE", callback=_parsed(_memory), help="Bytes at most, as 512m or 1g."
    ),
    click.option(
        "--cpus", type=float, metavar="N", callback=_parsed(_cpus), help="Processors at most, as 1.5."
    ),
    click.option(
        "--pids-limit", type=int, metavar="N", callback=_parsed(_pids), help="Processes at most."
    ),
    click.option(
        "-l",
        "--label",
        "labels",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_parsed(parse_labels),
        help="Label it; `ps --json` shows labels.",
    ),
    click.option(
        "--stop-signal",
        metavar="SIGNAL",
        callback=_parsed(_stop_signal),
        help="What `lamina stop` sends first; else as the image says, or TERM.",
    ),
)


def run_options(command: Command) -> Command:
    """Give a command all that says how a container is run, as its argument `options`.

    It also takes `arguments`, which are the container's command.
    """

    @wraps(command)
    def asked(
        *args: object,
        arguments: Sequence[str],
        entrypoint: str | None,
        read_only: bool,
        network: str,
        workdir: str | None,
        hostname: str | None,
        memory: int | None,
        cpus: float | None,
        pids_limit: int | None,
        stop_signal: str | None,
        **rest: Any,  # noqa: ANN401
    ) -> object:
        size = size_of(1, 0) if rest["terminal"] else None
        same = {name: rest.pop(name) for name in ("stdin", "terminal", "env", "binds", "user", "labels")}
        options = RunOptions(
            args=arguments,
            entrypoint=None if entrypoint is None else (entrypoint,) if entrypoint else (),
            readonly=read_only,
            network=Network(network),
            cwd=workdir or "",
            hostname=hostname or "",
            terminal_size=size,
            resources=Resources(memory=memory or 0, cpus=cpus or 0, pids=pids_limit or 0),
            stop_signal=stop_signal or "",
            **same,
        )
        return command(*args, options=options, **rest)

    for option in reversed(_OPTIONS):
        asked = option(asked)
    return asked
