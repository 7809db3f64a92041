"""The commands of `lamina`: what there is, by which names, and what each is for.

Sync. A command's module is loaded when the command is used: help and completion need none of them.
"""

import logging
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, shell_complete

from engine import failpoints
from engine.cli import signals
from engine.cli.context import REAPER, Context, default_root
from engine.cli.ending import end
from engine.cli.output import say
from engine.running import reaping

__all__ = ["ALIASES", "COMMANDS", "Listed", "lamina", "run"]

_COMPLETE = "_LAMINA_COMPLETE"


class Listed(NamedTuple):
    """A command: where it is, as "module:attribute" below this package, and its first line of help."""

    place: str
    help: str


COMMANDS: Mapping[str, Listed | Mapping[str, Listed]] = {
    "import": Listed(
        "importing:import_", "Import the images of a folder or an archive, and unpack them."
    ),
    "pull": Listed("pulling:pull", "Pull an image from a registry, and unpack it while it comes."),
    "push": Listed("pushing:push", "Push an image to a registry: only what is not there."),
    "copy": Listed("pushing:copy", "Copy an image between registries; nothing of it is stored here."),
    "run": Listed("launching:launch", "Run an image in a container; what is missing is pulled."),
    "ps": Listed("ps:ps", "List the containers that run; with --all also those that do not."),
    "logs": Listed("logs:logs", "Show what a container wrote; with --follow also what it writes."),
    "exec": Listed("executing:execute", "Run a further command in a container that runs."),
    "attach": Listed("launching:attach", "See and type what a container's first process does."),
    "stop": Listed("containers:stop", "End containers: by their stop signal, and later by SIGKILL."),
    "kill": Listed("containers:kill", "Send a signal to the first process of containers."),
    "rm": Listed("containers:remove", "Remove containers, and what they wrote."),
    "images": Listed("images:images", "List the images."),
    "image": {
        "ls": Listed("images:images", "List the images."),
        "inspect": Listed("inspecting:inspect", "Show what an image is made of and how it is run."),
        "tag": Listed("images:tag", "Give an image another name."),
        "label": Listed("labelling:label_image", "Show, set and delete labels of an image name."),
        "pin": Listed("labelling:pin", "Keep image names from every policy that removes some."),
        "unpin": Listed("labelling:unpin", "Leave image names to policies again."),
        "rm": Listed(
            "removing:remove", "Remove image names; `lamina gc` then frees what only they kept."
        ),
        "prune": Listed("pruning:prune", "Remove all images but those that are kept or in use."),
    },
    "unpack": Listed(
        "unpacking:unpack", "Unpack an image into snapshots; what is there is not done again."
    ),
    "mount": Listed("mounting:mount", "Mount an image at a folder, read-only unless --rw is given."),
    "umount": Listed("mounts:umount", "Unmount what `lamina mount` mounted; what was written stays."),
    "mounts": Listed("mounts:mounts", "List what is mounted, and the writable mounts that are kept."),
    "content": {
        "ls": Listed("content:list_blobs", "List the blobs."),
        "get": Listed("content:get", "Write a blob to stdout, verified on the way."),
        "label": Listed("labelling:label_blob", "Show, set and delete labels of a blob."),
        "rm": Listed("content:remove", "Remove blobs that no image needs."),
        "verify": Listed("verifying:verify", "Hash blobs again, all of them by default."),
    },
    "snapshots": {
        "ls": Listed("snapshots:list_snapshots", "List the snapshots."),
        "tree": Listed("snapshots:tree", "Draw what stands on what, and how much each takes up."),
        "usage": Listed("snapshots:usage", "Show what snapshots take up, their parents left out."),
        "label": Listed("labelling:label_snapshot", "Show, set and delete labels of a snapshot."),
        "rm": Listed("snapshots:remove", "Remove snapshots that nothing stands on."),
    },
    "du": Listed("du:du", "Show what takes up space, and what removing it would free."),
    "leases": {
        "ls": Listed("leases:list_leases", "List the leases."),
        "create": Listed("leases:create", "Make a lease, and print its ID."),
        "inspect": Listed("leases:inspect", "Show what a lease holds."),
        "rm": Listed("leases:remove", "Remove leases; `lamina gc` then frees what only they held."),
    },
    "namespaces": {
        "ls": Listed("namespaces:list_namespaces", "List the namespaces."),
        "create": Listed("namespaces:create", "Make a namespace before anything is in it."),
        "label": Listed("labelling:label_namespace", "Show, set and delete labels of a namespace."),
        "rm": Listed("namespaces:remove", "Remove namespaces that have nothing in them any more."),
    },
    "gc": Listed("collecting:gc", "Remove everything that no image, mount or running work holds."),
    "compact": Listed("store:compact", "Make the store's files as small as what they hold, by copies."),
    "fsck": Listed("fsck:fsck", "Hold the store, or some images, against itself and its layers."),
    "backends": Listed("store:backends", "List the snapshotters, whether they work here, and why not."),
    "demo": Listed("demo:demo", "Do all of it with an image that it makes itself; nothing stays."),
    "completion": Listed("completion:completion", "Print what a shell needs to complete words."),
}

_GROUPS = {
    "image": "List, inspect, tag, label, pin, remove and prune images.",
    "content": "List, read, check, label and remove blobs.",
    "snapshots": "List, draw, measure, label and remove snapshots.",
    "leases": "List, make, inspect and remove leases, which keep objects.",
    "namespaces": "List, make, label and remove namespaces.",
}

ALIASES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("image", "import"): ("import",),
    ("image", "pull"): ("pull",),
    ("image", "push"): ("push",),
    ("load",): ("import",),
    ("inspect",): ("image", "inspect"),
    ("tag",): ("image", "tag"),
    ("rmi",): ("image", "rm"),
    ("unmount",): ("umount",),
    ("snapshot",): ("snapshots",),
    ("lease",): ("leases",),
    ("namespace",): ("namespaces",),
    ("ns",): ("namespaces",),
}
"""What users of docker, podman and ctr type, and the command that it means."""


def _command(path: tuple[str, ...]) -> click.Command | None:
    path = ALIASES.get(path, path)
    found: Any = COMMANDS
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, Listed):
        module, _, attribute = found.place.partition(":")
        command: click.Command = getattr(import_module(f"engine.cli.{module}"), attribute)
        return command
    return _Group(path, name=path[-1], help=_GROUPS[path[-1]]) if found else None


class _Group(click.Group):
    """A group whose commands are those of the table below a path."""

    def __init__(self, path: tuple[str, ...] = (), **options: str) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._path = path

    def _entries(self) -> dict[str, str]:
        found: Any = COMMANDS
        for name in self._path:
            found = found[name]
        return {
            name: entry.help if isinstance(entry, Listed) else _GROUPS[name]
            for name, entry in found.items()
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._entries())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        is_run = (*self._path, cmd_name) == ("run",) and not ctx.resilient_parsing
        if is_run and os.geteuid() == 0:  # the command tells others that it takes root
            ctx.meta[REAPER] = reaping.begin()  # it is ready when the command is loaded
        return _command((*self._path, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._entries().items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = [
            CompletionItem(name, help=text)
            for name, text in self._entries().items()
            if name.startswith(incomplete)
        ]
        return items + click.Command.shell_complete(self, ctx, incomplete)


def _aliases() -> str:
    return "; ".join(f"{' '.join(alias)} for {' '.join(name)}" for alias, name in ALIASES.items())


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Also understood: {_aliases()}.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, readable=False),
    default=default_root,
    help="Folder of the store.",
    show_default="/var/lib/lamina, or ~/.local/share/lamina when not root",
)
@click.option("--namespace", default="default", show_default=True, help="Whose objects to use.")
@click.version_option(package_name="lamina")
@click.pass_context
def lamina(context: click.Context, root: Path, namespace: str) -> None:
    """Container images into mounted root file systems."""
    context.obj = Context(root, namespace)


def run() -> int:
    """Run the command line that this process was started with, and return its exit code."""
    words = sys.argv[1:]
    try:
        signals.raising()
        logging.getLogger().addHandler(_NOWHERE)  # stderr is for one line, the error
        for told in ("engine.kv.turn", "engine.recovery", "engine.doubts"):
            logging.getLogger(told).addHandler(_WAITING)
        failpoints.arm(os.environ.get("LAMINA_FAILPOINTS", ""))
        if _COMPLETE in os.environ:
            return shell_complete(lamina, {}, "lamina", _COMPLETE, os.environ[_COMPLETE])
        return _run(words)
    except BaseException as error:  # noqa: BLE001  the one place that turns errors into codes
        signals.leave_at_once()  # all is cleaned up; who is impatient need not wait for the rest
        return end(error, as_json="--json" in words and not _passes_on(words))


def _passes_on(words: list[str]) -> bool:
    """Say whether the command has words that are for another program, and write no document itself."""
    parser = lamina.make_parser(click.Context(lamina, allow_interspersed_args=False))
    try:
        _, command, _ = parser.parse_args(list(words))
    except click.UsageError:
        return False
    return command[:1] in (["run"], ["exec"])


def _run(words: list[str]) -> int:
    code = 0
    try:
        # Not click's `main`: it has ways of its own with an interrupt and with a closed pipe.
        with lamina.make_context("lamina", words) as context:
            lamina.invoke(context)
    except click.exceptions.NoArgsIsHelpError as asked:
        click.echo(asked.format_message())
    except click.exceptions.Exit as done:  # after --help and --version
        code = done.exit_code
    sys.stdout.flush()  # here, where a failure is still explained
    return code


class _Waiting(logging.Handler):
    """Shows that the store is being waited for, or is not in order: nothing else would tell."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        say(f"lamina: {record.getMessage()}")


_NOWHERE = logging.NullHandler()
_WAITING = _Waiting()
