"""Counts calls and what they bring in, for `engine.observing.metering`.

Async.
"""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import trio

from engine.observing.metering import Meter, Moved, Verb
from engine.observing.tally import Tally
from engine.stores import Stores

__all__ = ["bringing_in", "counted"]


class _HasStores(Protocol):
    stores: Stores


S = TypeVar("S", bound=_HasStores)
P = ParamSpec("P")
T = TypeVar("T")


Method = Callable[Concatenate[S, P], Coroutine[Any, Any, T]]


def counted(work: Verb) -> Callable[[Method[S, P, T]], Method[S, P, T]]:
    """Have each call of a method counted, and how it ends."""

    def decorated(method: Method[S, P, T]) -> Method[S, P, T]:
        @wraps(method)
        async def call(self: S, /, *arguments: P.args, **options: P.kwargs) -> T:
            with self.stores.root.meter.working(work):
                return await method(self, *arguments, **options)

        return call

    return decorated


@contextmanager
def bringing_in(meter: Meter, kind: Moved) -> Iterator[Tally]:
    """Give what is to be told of blobs that the block brings in; count them however it ends."""
    tally, began = Tally(), trio.current_time()
    try:
        yield tally
    finally:
        came = tally.headway().fetch
        fresh = came.done - came.found
        meter.moved(kind, fresh)
        meter.moved(Moved.FOUND, came.found)
    if kind is Moved.FETCHED:
        meter.pulled(fresh, trio.current_time() - began)
