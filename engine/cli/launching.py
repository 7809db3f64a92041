"""The commands `run` and `attach`: the first process of a container, and whoever typed the command.

Async.
"""

import sys
from contextlib import AsyncExitStack, nullcontext
from functools import partial

import click
import msgspec
import trio

from engine.app import Engine
from engine.cli.attending import Leaving, attend
from engine.cli.bars import progress
from engine.cli.completion import container_names, image_names
from engine.cli.context import Context, platform_option, snapshotter_option
from engine.cli.naming import container_named, new_name
from engine.cli.output import View, say, write
from engine.cli.reaching import access_options
from engine.cli.run_options import check_terminal, run_options
from engine.cli.running import run
from engine.cli.signals import Stopped
from engine.errors import AlreadyExists, EngineError, NotFound
from engine.identifiers import check_identifier
from engine.oci.platform import Platform
from engine.progress import silent
from engine.provision.places import folder_of
from engine.registry.client import Access, open_client
from engine.running.attaching import Attachment, ended
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.options import RunOptions
from engine.running.settling import told
from engine.running.statuses import ContainerStatus

__all__ = ["attach", "launch"]


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("image", shell_complete=image_names)
@click.argument("arguments", metavar="[COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@run_options
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
    if name is not None:
        check_identifier(name, "container name")
    if not detach:
        check_terminal(stdin=options.stdin, terminal=options.terminal)
    called = name or new_name()

    async def work(engine: Engine) -> int:
        async with AsyncExitStack() as stack:
            containers = await stack.enter_async_context(open_containerizer(engine))
            is_asked = pull == "always" or (pull == "missing" and not _is_here(engine, image, platform))
            client = await stack.enter_async_context(open_client(access)) if is_asked else None
            with progress(View(quiet=quiet)) if is_asked else nullcontext(silent) as report:
                if client and pull == "always":
                    await engine.pull(image, client, platform=platform, report=report)
                launched = await containers.launch(
                    called,
                    image,
                    options,
                    snapshotter=snapshotter,
                    platform=platform,
                    client=client,
                    attached=not detach,
                    exit_argv=_removal(context) if remove else (),
                    report=report,
                )
            if launched.already:
                raise AlreadyExists(
                    f"container {called} exists; choose another name, or remove it with `lamina rm`"
                )
            if launched.attachment is None:
                write([called])
                return 0
            stack.push_async_callback(launched.attachment.aclose)
            return await _foreground(
                containers,
                launched.status,
                launched.attachment,
                stdin=options.stdin,
                terminal=options.terminal,
                remove=remove,
            )

    code = run(context, work, create=pull != "never")
    if code:
        raise click.exceptions.Exit(code)


def _is_here(engine: Engine, image: str, platform: Platform | None) -> bool:
    """Say whether an image can be run without asking anybody; another platform's may have to come."""
    if platform is not None:
        return False
    try:
        engine.stores.images.get(image)
    except NotFound:
        return False
    return True


def _removal(context: Context) -> tuple[str, ...]:
    """Return the command that removes a container; what it is called is still to be added."""
    command = (sys.executable, "-P", "-m", "engine", "--root", str(context.root.absolute()))
    return (*command, "--namespace", context.namespace, "rm", "--force")


async def _foreground(
    containers: Containerizer,
    status: ContainerStatus,
    attachment: Attachment,
    *,
    stdin: bool,
    terminal: bool,
    remove: bool = False,
) -> int:
    """Attend to a container until it ends, or is left; return this command's exit code."""
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
            raise Stopped(left.signal)
        case Leaving.UNREAD:
            await containers.stop(name, grace_s=0)  # as SIGPIPE ends who writes to nobody
    if remove:
        with trio.CancelScope(shield=True):
            await containers.destroy(name)
    if left.why is Leaving.UNREAD:
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
