"""What was measured, as values: written as JSON, read again, and what follows from it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.costs import Cost, Spread, spread_of

__all__ = ["Measured", "Report", "Runs", "merged"]


@dataclass(frozen=True)
class Runs:
    """What a contender took, or why it did not take part."""

    name: str
    stage: str
    is_ours: bool = False
    costs: list[Cost] = field(default_factory=list)
    left_out: str = ""

    @property
    def seconds(self) -> Spread:
        """Wall seconds."""
        return spread_of([cost.seconds for cost in self.costs])

    @property
    def busy(self) -> float:
        """Seconds on a processor, of all processes."""
        return median(cost.busy for cost in self.costs)

    @property
    def own(self) -> int:
        """The most memory of their own that all processes had at once."""
        return max(cost.own for cost in self.costs)


@dataclass(frozen=True)
class Measured:
    """An image: what it unpacks to, its limits, and all contenders."""

    image: str
    layers: int
    packed: int
    size: int
    entries: int
    cores: int
    rooflines: dict[str, list[Cost]]
    contenders: list[Runs]

    def limits(self) -> Mapping[str, float]:
        """Return the median seconds of each roofline."""
        return {name: median(cost.seconds for cost in costs) for name, costs in self.rooflines.items()}

    def highest(self) -> tuple[str, float]:
        """Return the part of the work that takes longest alone, and its seconds."""
        limits = self.limits()
        name = max(limits, key=lambda name: limits[name])
        return name, limits[name]

    def all_work(self) -> float:
        """Return how long all parts take if they fill all cores: what they spend, over the cores."""
        return sum(median(cost.busy for cost in costs) for costs in self.rooflines.values()) / self.cores

    def took_part(self, stage: str) -> Sequence[Runs]:
        """Return those that were timed in a stage."""
        return [runs for runs in self.contenders if runs.stage == stage and runs.costs]

    def base(self, stage: str) -> Runs | None:
        """Return the contender that the others of a stage are compared with: the first of ours."""
        return next((runs for runs in self.took_part(stage) if runs.is_ours), None)

    def find(self, name: str, stage: str) -> Runs | None:
        """Return one that was timed."""
        return next((runs for runs in self.took_part(stage) if runs.name == name), None)


@dataclass(frozen=True)
class Report:
    """A run of the harness: on what, how, and all images."""

    machine: dict[str, str]
    options: dict[str, str]
    images: list[Measured] = field(default_factory=list)


def merged(reports: Sequence[Report]) -> Report:
    """Return several runs as one, of an image that is in several the last."""
    images = {measured.image: measured for report in reports for measured in report.images}
    machine = {key: value for report in reports for key, value in report.machine.items()}
    return Report(machine, reports[-1].options, list(images.values()))
