"""Runs long work on an event loop, which a signal cancels.

Async.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from engine.app import Engine, open_engine
from engine.cli.context import Context
from engine.cli.signals import Stopped, handled

__all__ = ["run", "run_loop", "run_with"]

S = TypeVar("S")
T = TypeVar("T")


def run(
    context: Context,
    work: Callable[[Engine], Awaitable[T]],
    *,
    create: bool = False,
    durability: str = "full",
    bandwidth: float | None = None,
) -> T:
    """Run `work` on an open engine, for commands that take long; only `create` makes a store."""
    opening = open_engine(
        context.root,
        namespace=context.namespace,
        create=create,
        durability=durability,
        bandwidth=bandwidth,
    )
    return run_with(opening, work)


def run_with(opening: AbstractAsyncContextManager[S], work: Callable[[S], Awaitable[T]]) -> T:
    """Run `work` on what is opened for it.

    A signal that comes after `work` is too late: what was made stays, so that is what the command says.
    """
    done: list[T] = []

    async def opened() -> None:
        async with opening as something:
            done.append(await work(something))

    try:
        run_loop(opened)
    except KeyboardInterrupt:
        if not done:
            raise
    return done[0]


def run_loop(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work` to its end. Raises Stopped when a signal came and `work` has cleaned up."""
    scope = trio.CancelScope()
    came: list[int] = []
    wake: list[Callable[[], object]] = [scope.cancel]

    def stop(number: int) -> None:
        came.append(number)
        try:
            wake[-1]()
        except trio.RunFinishedError:  # then what was asked for is done
            pass

    async def within() -> list[T]:
        token = trio.lowlevel.current_trio_token()
        wake.append(lambda: token.run_sync_soon(scope.cancel))
        with scope:
            return [await work()]
        return []

    with handled(stop):
        try:
            done = trio.run(within)
        except BaseException as error:
            if came:  # whatever broke off then is its effect
                raise Stopped(came[0]) from error
            raise
    if not done:
        raise Stopped(came[0])
    return done[0]
