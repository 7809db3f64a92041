"""A layer under way to a committed snapshot: how far it is, for the layer above and for its callers.

Async.
"""

import trio

from engine.diff.apply import Applied
from engine.unpack.flights import Flight
from engine.unpack.lease import HeldLease

__all__ = ["LayerFlight"]


class LayerFlight(Flight[Applied]):
    """A layer under way; `lease` is whose it is, `entries` and `size` those of all layers up to it.

    The one above waits for both events: so layers are queued bottom first, as what is committed first
    should not be applied last, and reach the committer in chain order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lease: HeldLease | None = None
        self.entries = 0
        self.size = 0
        self.is_queued = trio.Event()
        self.is_ready = trio.Event()
