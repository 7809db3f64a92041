"""A layer under way to a committed snapshot: how far it is, for the layer above and for its callers.

Async.
"""

import trio

from engine.diff.apply import Applied
from engine.unpack.flights import Flight
from engine.unpack.lease import HeldLease

__all__ = ["LayerFlight"]


class LayerFlight(Flight[Applied | None]):
    """A layer under way; `lease` is whose it is, `entries` and `size` those of all layers up to it.

    Its result is None where another process made it. `twin` is the same layer on another base, which
    began before it. The one above waits for `is_ready`, so that layers reach the committer in chain
    order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lease: HeldLease | None = None
        self.twin: LayerFlight | None = None
        self.entries = 0
        self.size = 0
        self.is_ready = trio.Event()
