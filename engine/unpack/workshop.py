"""What all engines share that one event loop has open on one root: workers, and the work under way.

Async.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from engine.fs.room import writers
from engine.observing.metering import Layers, Meter
from engine.registry.lanes import Lanes
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.unpack.arrivals import Arrivals
from engine.unpack.committer import Committer
from engine.unpack.flights import Flight, Flights
from engine.unpack.flusher import Flusher
from engine.unpack.layer_flight import LayerFlight
from engine.unpack.layer_locks import LayerLocks
from engine.unpack.pool import WorkerPool
from engine.unpack.twins import Twins

__all__ = ["Workshop", "open_workshop"]


class Workshop:
    """Workers, the work under way, and who makes a layer of all processes."""

    def __init__(
        self,
        root: Path,
        applies: int | None = None,
        fetches: int | None = None,
        bandwidth: float | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.meter = meter or Meter()
        self.pool = WorkerPool(applies or writers(), self.meter)
        self.flusher = Flusher(self.pool)
        self.flights = Flights(LayerFlight, partial(self.meter.had, Layers.SHARED))
        self.pulls: Flights[Flight[Any]] = Flights(Flight, self.meter.shared_pull)
        self.twins = Twins()
        self.arrivals = Arrivals()
        self.lanes = Lanes(fetches, bandwidth)
        self.locks = LayerLocks(root / "layers")
        self.users = 0
        self._committers: dict[tuple[str, str], Committer] = {}

    def committer(self, namespace: str, snapshotter: Snapshotter) -> Committer:
        """Return what commits the layers of a backend in a namespace."""
        made = Committer(snapshotter, self.flusher)
        return self._committers.setdefault((namespace, snapshotter.name), made)

    async def aclose(self) -> None:
        """End what is under way, and all workers after what is being written is written."""
        with trio.CancelScope(shield=True):
            for flights in (self.pulls, self.flights):
                await flights.aclose()
            for committer in self._committers.values():
                await committer.idle()
            await self.flusher.aclose()
            await self.pool.aclose()


_open: dict[tuple[int, trio.lowlevel.TrioToken], Workshop] = {}


@asynccontextmanager
async def open_workshop(
    root: Root,
    applies: int | None = None,
    fetches: int | None = None,
    bandwidth: float | None = None,
) -> AsyncIterator[Workshop]:
    """Give the workshop of an open root for the length of a block, the same to all who ask.

    If nobody had it before, `applies` is how many layers at once, by default as many as processors;
    `fetches` how many blobs or parts of them, `bandwidth` how many bytes of them a second.
    """
    key = (id(root), trio.lowlevel.current_trio_token())
    workshop = _open.get(key)
    if workshop is None:
        workshop = _open[key] = Workshop(root.path, applies, fetches, bandwidth, root.meter)
    workshop.users += 1
    try:
        yield workshop
    finally:
        workshop.users -= 1
        if not workshop.users:
            del _open[key]
            await workshop.aclose()
