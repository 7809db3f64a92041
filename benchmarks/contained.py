"""What containers cost, as values, and the figures that follow from them. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from benchmarks.costs import spread_of
from benchmarks.pulled import Figure
from benchmarks.targets import CONTAINERS

__all__ = ["BEGIN", "END", "ContainerReport", "figures", "markdown", "merged"]

BEGIN, END = "<!-- figures of containers -->", "<!-- end of figures of containers -->"


@dataclass(frozen=True)
class ContainerReport:
    """A run: on what, how many containers there were at once, and the seconds of every turn."""

    machine: dict[str, str]
    many: int
    layers: int
    turns: dict[str, list[float]] = field(default_factory=dict)


def merged(reports: Sequence[ContainerReport]) -> ContainerReport:
    """Return several runs as one, of a turn that is in several the last."""
    turns = {name: seconds for report in reports for name, seconds in report.turns.items()}
    return replace(reports[-1], turns=turns)


def figures(report: ContainerReport) -> Sequence[Figure]:
    """Return those figures for which there is a measurement."""
    middle = {name: median(seconds) for name, seconds in report.turns.items() if seconds}
    found: list[Figure] = []
    for what, figure in _FIGURES.items():
        try:
            value, made_of = figure(middle)
        except KeyError:  # one of them was not asked for
            continue
        words = what.format(many=f"{report.many:,}", layers=report.layers)
        found.append(Figure(words, value, CONTAINERS.get(what), ", ".join(made_of)))
    return found


_Made = tuple[float, Iterator[str]]
_Medians = Mapping[str, float]


def _beside(ours: str, theirs: str) -> Callable[[_Medians], _Made]:
    """Return our time as a multiple of another's."""
    return lambda middle: (middle[ours] / middle[theirs], _shown(middle, ours, theirs))


def _beyond_start(middle: _Medians) -> _Made:
    """Return what the command takes beyond its start, as a multiple of what runc takes."""
    ours, start, theirs = "lamina run", "imports", "runc run from the shell"
    value = (middle[ours] - middle[start]) / middle[theirs]
    return value, _shown(middle, ours, start, theirs)


def _seconds(name: str) -> Callable[[_Medians], _Made]:
    return lambda middle: (middle[name], _shown(middle, name))


def _shown(middle: _Medians, *names: str) -> Iterator[str]:
    return (f"{middle[name] * 1e3:.1f} ms" for name in names)


_FIGURES: Mapping[str, Callable[[_Medians], _Made]] = {
    "provision, `runc run` and destroy, beside `runc run` of a bundle": _beside(
        "provisioned", "runc run"
    ),
    "launch, wait and destroy, beside `runc run` of a bundle": _beside("launched", "runc run"),
    "`lamina run`, less the start of Python with its imports, beside `runc run`": _beyond_start,
    "provision and destroy on {layers} layers, beside `podman create` and `podman rm`": _beside(
        "provision and destroy", "podman create and rm"
    ),
    "provision beside {many} containers, and beside none": _beside("beside many", "beside none"),
    "recover of {many} containers, seconds": _seconds("recover"),
    "recover of {many} containers after their mounts vanished, seconds": _seconds("recover unmounted"),
}


def markdown(report: ContainerReport) -> str:
    """Return the figures and what they were made of as a part of a page."""
    about = "; ".join(f"{key} {value}" for key, value in report.machine.items())
    rows = ["| figure | measured | at most | of |", "| --- | ---: | ---: | --- |"]
    for figure in figures(report):
        value = f"**{figure.value:.2f}**" if figure.misses else f"{figure.value:.2f}"
        most = "" if figure.most is None else f"{figure.most:.2g}"
        rows.append(f"| {figure.what} | {value} | {most} | {figure.made_of} |")
    turns = ["| | turns | median | min-max |", "| --- | ---: | ---: | ---: |"]
    for name, seconds in report.turns.items():
        if seconds:
            wall = spread_of([each * 1e3 for each in seconds])
            spread = f"{wall.min:.1f}-{wall.max:.1f}"
            turns.append(f"| {name} | {len(seconds)} | {wall.median:.1f} ms | {spread} |")
    return "\n\n".join([f"{about}.", "\n".join(rows), "\n".join(turns)])
