"""What of a chain has to be unpacked. Pure."""

from collections.abc import Callable, Sequence

from engine.oci.identity import ChainID

__all__ = ["missing_from"]


def missing_from(chain: Sequence[ChainID], has: Callable[[ChainID], bool]) -> int:
    """Return the position of the first layer that is missing.

    Asked from the top down: a snapshot's parents are there whenever it is.
    """
    for position in range(len(chain), 0, -1):
        if has(chain[position - 1]):
            return position
    return 0
