"""The same layer on several bases at once: one is applied, the others wait for it and have its data.

Async. Who waits began later than whom he waits for, and a layer begins after those below it: so nobody
waits in a circle.
"""

from collections.abc import Hashable

from engine.unpack.layer_flight import LayerFlight

__all__ = ["Twins"]


class Twins:
    """The first of each layer that is under way, by what layer it is."""

    def __init__(self) -> None:
        self._first: dict[Hashable, LayerFlight] = {}

    def begin(self, layer: Hashable, flight: LayerFlight) -> LayerFlight | None:
        """Begin a flight; return the one of the same layer that is under way, None if this is it."""
        first = self._first.setdefault(layer, flight)
        return None if first is flight else first

    def end(self, layer: Hashable, flight: LayerFlight) -> None:
        """End a flight."""
        if self._first.get(layer) is flight:
            del self._first[layer]
