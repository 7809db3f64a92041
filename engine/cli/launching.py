"""The commands `run` and `attach`: the first process of a container, and whoever typed the command.

Async.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial

import click
import msgspec
import trio

from engine.app import Engine
from engine.cli.attending import Leaving, attend
from engine.cli.bars import progress
from engine.cli.completion import container_names, image_names
from engine.cli.context import REAPER, Context, platform_option, snapshotter_option
from engine.cli.naming import container_named, new_name
from engine.cli.output import View, say, write
from engine.cli.reaching import access_options
from engine.cli.run_options import check_terminal, run_options, storage_option
from engine.cli.running import run
from engine.errors import AlreadyExists, EngineError, NotFound, PermissionDenied
from engine.identifiers import check_identifier
from engine.metadata.containers import ContainerState
from engine.oci.platform import Platform
from engine.provision.places import folder_of
from engine.registry.client import Access, open_client
from engine.running.attaching import Attachment, ended
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.options import RunOptions
from engine.running.reaping import Reaper
from engine.running.runc import find_runtime
from engine.running.settling import told
from engine.running.statuses import ContainerStatus, Launched

__all__ = ["attach", "launch"]


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("image", shell_complete=image_names)
@click.argument("arguments", metavar="[COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@run_options
@storage_option
@click.option("--name", help="What to call the container; else it gets a name.")
@click.option("--rm", "remove", is_flag=True, help="Remove it once it has ended.")
@click.option("-d", "--detach", is_flag=True, help="Print its name, and leave it to itself.")
@click.option(
    "--pull",
    type=click.Choice(["missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to ask a registry.",
)
@platform_option
@snapshotter_option
@access_options
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of a pull.")
@click.pass_obj
def launch(
    context: Context,
    image: str,
    options: RunOptions,
    quota: int,
    name: str | None,
    remove: bool,
    detach: bool,
    pull: str,
    platform: Platform | None,
    snapshotter: str | None,
    access: Access,
    quiet: bool,
) -> None:
    """Run an image in a container; what is missing is pulled.

    It ends with the exit code of COMMAND, which is the image's if none is given. Without --network host
    there is no network. Ctrl-C and other signals go to the command.
    """
    if os.geteuid() != 0:
        raise PermissionDenied("only root can run containers; use sudo")
    if name is not None:
        check_identifier(name, "container name")
    if not detach:
        check_terminal(stdin=options.stdin, terminal=options.terminal)
    wanted = _Wanted(
        name=name or new_name(),
        image=image,
        options=options,
        quota=quota,
        pull=pull,
        platform=platform,
        snapshotter=snapshotter,
        access=access,
        quiet=quiet,
        attached=not detach,
        exit_argv=_removal(context) if remove else (),
        reaper=click.get_current_context().meta.get(REAPER),
    )
    code = run(context, wanted.carry_out, create=pull != "never")
    if code:
        raise click.exceptions.Exit(code)


def _removal(context: Context) -> tuple[str, ...]:
    """Return the command that removes a container; what it is called is still to be added."""
    command = (sys.executable, "-P", "-m", "engine", "--root", str(context.root.absolute()))
    return (*command, "--namespace", context.namespace, "rm", "--force")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is to be run, and how."""

    name: str
    image: str
    options: RunOptions
    quota: int
    pull: str
    platform: Platform | None
    snapshotter: str | None
    access: Access
    quiet: bool
    attached: bool
    exit_argv: tuple[str, ...]
    """What removes the container once it has ended, if anything."""
    reaper: Reaper | None

    async def carry_out(self, engine: Engine) -> int:
        """Run it; return the command's exit code."""
        async with open_containerizer(engine, reaper=self.reaper) as containers:
            async with trio.open_nursery() as nursery:
                # Meanwhile, and before much is pulled for nothing.
                nursery.start_soon(trio.to_thread.run_sync, find_runtime, None)
                launched = await self._launched(engine, containers)
            if launched.already:
                raise AlreadyExists(
                    f"container {self.name} exists; choose another name, or remove it: lamina rm"
                )
            if launched.attachment is None:
                write([self.name])
                return 0
            try:
                return await self._attended(containers, launched.status, launched.attachment)
            except trio.Cancelled:  # by a signal from before any was passed on
                with trio.CancelScope(shield=True):
                    await containers.destroy(self.name)
                raise

    async def _launched(self, engine: Engine, containers: Containerizer) -> Launched:
        launch = partial(
            containers.launch,
            self.name,
            self.image,
            self.options,
            quota=self.quota,
            snapshotter=self.snapshotter,
            platform=self.platform,
            attached=self.attached,
            exit_argv=self.exit_argv,
        )
        if self.pull == "never" or (self.pull == "missing" and self._is_here(engine)):
            return await launch()
        async with open_client(self.access) as client:
            with progress(View(quiet=self.quiet)) as report:
                if self.pull == "missing":
                    return await launch(client=client, report=report)
                await engine.pull(
                    self.image,
                    client,
                    snapshotter=self.snapshotter or engine.stores.snapshotter().name,
                    platform=self.platform,
                    report=report,
                )
            return await launch()

    def _is_here(self, engine: Engine) -> bool:
        """Say whether the image can be run without asking anybody; another platform's may be missing."""
        if self.platform is not None:
            return False
        try:
            engine.stores.images.get(self.image)
        except NotFound:
            return False
        return True

    async def _attended(
        self, containers: Containerizer, status: ContainerStatus, attachment: Attachment
    ) -> int:
        stdin, terminal = self.options.stdin, self.options.terminal
        try:
            return await _foreground(
                containers, status, attachment, stdin=stdin, terminal=terminal, is_own=True
            )
        finally:
            with trio.CancelScope(shield=True):
                await attachment.aclose()
                if self.exit_argv:
                    await self._remove(containers)

    async def _remove(self, containers: Containerizer) -> None:
        """Remove the container, unless it goes on: then its monitor sees to that, without this client.

        It may also have ended while this command was leaving it.
        """
        try:
            if (await containers.status(self.name)).state == ContainerState.STOPPED:
                await containers.destroy(self.name)
        except NotFound:
            pass


async def _foreground(
    containers: Containerizer,
    status: ContainerStatus,
    attachment: Attachment,
    *,
    stdin: bool,
    terminal: bool,
    is_own: bool = False,
) -> int:
    """Attend to a container until it ends, or is left; return this command's exit code.

    One that is its own has nobody else to write to.
    """
    name = status.id
    end = partial(ended, folder_of(containers.stores.root.path, status.unique))
    kill = partial(containers.kill, name)
    left = await attend(attachment, kill, end, stdin=stdin, terminal=terminal)
    match left.why:
        case Leaving.DETACHED:
            say(f"lamina: {name} goes on; `lamina attach {name}` comes back to it")
            return 0
        case Leaving.FORCED:
            say(f"lamina: {name} goes on; `lamina kill {name}` ends it")
            return 128 + left.signal
        case Leaving.HUNG_UP:
            return 128 + left.signal
        case Leaving.UNREAD:
            if is_own:
                await containers.stop(name, grace_s=0)  # as SIGPIPE ends who writes to nobody
            return 0
    outcome = attachment.outcome
    if outcome is None or outcome.code is None:
        raise EngineError(f"nobody saw how container {name} ended; its monitor was killed")
    return outcome.code


@click.command("attach")
@click.argument("word", metavar="CONTAINER", shell_complete=container_names)
@click.option("--no-stdin", is_flag=True, help="Pass on nothing of what is typed.")
@click.pass_obj
def attach(context: Context, word: str, no_stdin: bool) -> None:
    """See and type what a container's first process does.

    Ctrl-P Ctrl-Q leaves one with a terminal. What it wrote before is in its log.
    """

    async def work(engine: Engine) -> int:
        record = container_named(engine.stores, word)
        options = msgspec.json.decode(record.order, type=RunOptions)
        stdin = options.stdin and not no_stdin
        check_terminal(stdin=stdin, terminal=options.terminal)
        async with (
            open_containerizer(engine) as containers,
            containers.attach(record.id) as attachment,
        ):
            return await _foreground(
                containers, told(record), attachment, stdin=stdin, terminal=options.terminal
            )

    code = run(context, work)
    if code:
        raise click.exceptions.Exit(code)
