"""What a run took. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Cost", "Spread", "spread_of"]


@dataclass(frozen=True)
class Cost:
    """Wall seconds, seconds on a processor, and bytes of memory of all processes together.

    `own` is the peak of memory that is theirs alone, `mapped` with the files that they have mapped,
    pages of which that are in several processes counted for each.
    """

    seconds: float = 0.0
    user: float = 0.0
    system: float = 0.0
    own: int = 0
    mapped: int = 0

    @property
    def busy(self) -> float:
        """Seconds on a processor."""
        return self.user + self.system

    def __add__(self, later: "Cost") -> "Cost":
        return Cost(
            self.seconds + later.seconds,
            self.user + later.user,
            self.system + later.system,
            max(self.own, later.own),
            max(self.mapped, later.mapped),
        )


@dataclass(frozen=True)
class Spread:
    """The middle of several values, and how far they lie apart."""

    median: float
    min: float
    max: float


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    return Spread(median(values), min(values), max(values))
