"""The commands `stop`, `kill` and `rm`.

Async.
"""

from collections.abc import Awaitable, Callable, Sequence
from math import isnan

import click

from engine.app import Engine
from engine.cli.completion import container_names
from engine.cli.container_shapes import ShownContainer, shown
from engine.cli.context import Context, action
from engine.cli.ending import Incomplete
from engine.cli.naming import container_named
from engine.cli.output import View, document
from engine.cli.running import run
from engine.errors import EngineError, FailedPrecondition, InvalidArgument, NotFound
from engine.metadata.containers import ContainerState
from engine.oci.signals import parse_signal
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.statuses import ContainerStatus

__all__ = ["kill", "remove", "stop"]

_IDLE = {ContainerState.PROVISIONED, ContainerState.STOPPED, ContainerState.DESTROYING}

_names = click.argument(
    "names", metavar="CONTAINER...", nargs=-1, required=True, shell_complete=container_names
)

Act = Callable[[Containerizer, str], Awaitable[object]]


def _on_each(context: Context, words: Sequence[str], act: Act, what: str) -> list[object]:
    """Do something to containers, one after the other; return what came of each.

    All must be there before anything is done. Where one fails, that stands as `what` beside its error.
    """
    done: list[object] = []

    async def work(engine: Engine) -> None:
        names = [container_named(engine.stores, word).id for word in words]
        async with open_containerizer(engine) as containers:
            for name in dict.fromkeys(names):
                came = await act(containers, name)
                done.append(came)

    try:
        run(context, work)
    except EngineError as error:
        raise Incomplete(error, {what: done}) from error
    return done


async def _shown(containers: Containerizer, before: ContainerStatus) -> ShownContainer:
    """Return a container as it is, or as it was if it is one that goes when it has ended."""
    try:
        return shown(await containers.status(before.id))
    except NotFound:
        return shown(before)


def _number(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    return parse_signal(text)


def _seconds(_context: click.Context, _parameter: click.Parameter, seconds: float) -> float:
    if isnan(seconds):  # which is in any range
        raise InvalidArgument("--time nan: write how many seconds")
    return seconds


@click.command("stop")
@_names
@click.option(
    "-t",
    "--time",
    "seconds",
    type=click.FloatRange(0, 1e6),
    callback=_seconds,
    default=10.0,
    show_default="10",
    metavar="SECONDS",
    help="Wait so long before it is killed.",
)
@click.option("-s", "--signal", "name", default="", metavar="SIGNAL", help="Instead of its stop signal.")
@action
@click.pass_obj
def stop(context: Context, names: tuple[str, ...], seconds: float, name: str, view: View) -> None:
    """End containers: by their stop signal, and later by SIGKILL.

    What they wrote stays until `lamina rm`.
    """
    if name:
        parse_signal(name)

    async def act(containers: Containerizer, one: str) -> object:
        before = await containers.status(one)
        await containers.stop(one, signal=name, grace_s=seconds)
        return await _shown(containers, before)

    done = _on_each(context, names, act, "containers")
    if view.json:
        document(done)


@click.command("kill")
@_names
@click.option(
    "-s",
    "--signal",
    "number",
    default="KILL",
    callback=_number,
    metavar="SIGNAL",
    show_default=True,
    help="By name or number.",
)
@action
@click.pass_obj
def kill(context: Context, names: tuple[str, ...], number: int, view: View) -> None:
    """Send a signal to the first process of containers.

    SIGKILL if nothing else is said, as 9, KILL or SIGKILL.
    """

    async def act(containers: Containerizer, one: str) -> object:
        before = await containers.status(one)
        await containers.kill(one, number)
        return await _shown(containers, before)

    done = _on_each(context, names, act, "containers")
    if view.json:
        document(done)


@click.command("rm")
@_names
@click.option("-f", "--force", is_flag=True, help="Kill those that run.")
@action
@click.pass_obj
def remove(context: Context, names: tuple[str, ...], force: bool, view: View) -> None:
    """Remove containers, and what they wrote.

    One that runs is not removed without --force.
    """

    async def act(containers: Containerizer, one: str) -> object:
        status = await containers.status(one)
        if status.state not in _IDLE and not force:
            raise FailedPrecondition(f"container {one} is {status.state}; end it first, or use -f")
        await containers.destroy(one)
        return one

    done = _on_each(context, names, act, "removed")
    if view.json:
        document({"removed": done})
