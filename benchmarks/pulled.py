"""What pulls cost, as values, and the figures that follow from them. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from benchmarks.costs import Cost, spread_of

__all__ = ["BEGIN", "END", "Figure", "PullCost", "PullReport", "figures", "markdown", "merged"]

BEGIN, END = "<!-- figures of pulls -->", "<!-- end of figures of pulls -->"


@dataclass(frozen=True)
class PullCost(Cost):
    """What pulls took, and what the registry and the line to it did for them.

    `serving` is seconds on a processor, `sent` bytes of blobs.
    """

    serving: float = 0.0
    requests: int = 0
    sent: int = 0


@dataclass(frozen=True)
class PullReport:
    """A run: on what, of which image, and what every turn of each pull took."""

    machine: dict[str, str]
    image: str
    packed: int
    latency: float
    rate: float
    turns: dict[str, list[PullCost]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def merged(reports: Sequence[PullReport]) -> PullReport:
    """Return several runs on one image as one, of a pull that is in several the last."""
    last = reports[-1]
    turns = {name: costs for report in reports for name, costs in report.turns.items()}
    left_out = {name: why for report in reports for name, why in report.left_out.items()}
    return replace(last, turns=turns, left_out=left_out)


@dataclass(frozen=True)
class Figure:
    """A figure, what it may be at most, and what it was made of."""

    what: str
    value: float
    most: float | None
    made_of: str

    @property
    def misses(self) -> bool:
        """Whether it is more than it may be."""
        return self.most is not None and self.value > self.most

    def __str__(self) -> str:
        bound = "" if self.most is None else f"at most {self.most:.2f}"
        mark = "!" if self.misses else " "
        return f"{mark} {self.value:6.2f}  {bound:<12}  {self.what} ({self.made_of})"


class _Medians:
    """The middle of what each pull took; KeyError for one that was not made."""

    def __init__(self, turns: Mapping[str, Sequence[PullCost]]) -> None:
        self._turns = {name: costs for name, costs in turns.items() if costs}

    def wall(self, name: str) -> float:
        return median(cost.seconds for cost in self._turns[name])

    def busy(self, name: str) -> float:
        return median(cost.busy for cost in self._turns[name])

    def requests(self, name: str) -> int:
        return max(cost.requests for cost in self._turns[name])

    def sent(self, name: str) -> int:
        return max(cost.sent for cost in self._turns[name])


def figures(report: PullReport) -> Sequence[Figure]:
    """Return those figures for which there is a measurement."""
    found = []
    medians = _Medians(report.turns)
    for each in (_beside_containerd, _over_a_line, _at_once, _again, _on_one_base):
        try:
            found += [*each(medians, report)]
        except KeyError:  # one of them was not asked for, or could not be made
            continue
    return found


def _beside_containerd(medians: _Medians, _: PullReport) -> Iterator[Figure]:
    theirs = medians.wall("ctr")
    for how in ("full", "lazy"):
        ours = medians.wall(how)
        yield Figure(
            f"a pull, {_FLUSHED[how]}, beside containerd's",
            ours / theirs,
            0.4,
            f"{ours:.2f} s, {theirs:.2f} s",
        )


_FLUSHED = {"full": "flushed", "lazy": "not flushed"}


def _over_a_line(medians: _Medians, report: PullReport) -> Iterator[Figure]:
    ours, transfer, unpack = (medians.wall(name) for name in ("far", "transfer", "unpack"))
    yield Figure(
        f"a pull over {report.latency * 1000:g} ms and {report.rate / 1e6:g} MB/s, "
        "beside the longer of transfer and unpack",
        ours / max(transfer, unpack),
        1.1,
        f"{ours:.2f} s; {transfer:.2f} s, {unpack:.2f} s",
    )


def _at_once(medians: _Medians, _: PullReport) -> Iterator[Figure]:
    for many, what, most in (
        ("ten callers", "ten pulls of one image in a process", True),
        ("ten processes", "ten pulls of one image, a process for each", False),
    ):
        one, ten = medians.busy("one caller"), medians.busy(many)
        made_of = f"{ten:.2f} s, {one:.2f} s on a processor"
        yield Figure(f"{what}, beside one", ten / one, 1.05 if most else None, made_of)
        once, all_sent = medians.sent("one caller"), medians.sent(many)
        made_of = f"{all_sent / 1e6:.1f} MB, {once / 1e6:.1f} MB"
        yield Figure(
            f"{what}: blobs that left the registry", all_sent / once, 1 if most else None, made_of
        )


def _again(medians: _Medians, _: PullReport) -> Iterator[Figure]:
    again, first = medians.wall("again"), medians.wall("full")
    yield Figure(
        "a pull of what is there, beside the first", again / first, 0.05, f"{again:.2f} s, {first:.2f} s"
    )
    yield Figure("requests of it", medians.requests("again"), 2, "most")


def _on_one_base(medians: _Medians, _: PullReport) -> Iterator[Figure]:
    ours, theirs = medians.wall("twenty"), medians.wall("twenty by ctr")
    yield Figure(
        "twenty images on one base, beside twenty pulls by containerd",
        ours / theirs,
        0.4,
        f"{ours:.2f} s, {theirs:.2f} s",
    )


def markdown(report: PullReport) -> str:
    """Return the figures and what they were made of as a part of a page."""
    about = "; ".join(f"{key} {value}" for key, value in report.machine.items())
    rows = ["| figure | measured | at most | of |", "| --- | ---: | ---: | --- |"]
    for figure in figures(report):
        value = f"**{figure.value:.2f}**" if figure.misses else f"{figure.value:.2f}"
        most = "" if figure.most is None else f"{figure.most:g}"
        rows.append(f"| {figure.what} | {value} | {most} | {figure.made_of} |")
    title = f"`{report.image}`, {report.packed / 1e6:,.0f} MB; {about}."
    turns = [
        "| | median | min-max | CPU | MB | registry's CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, costs in report.turns.items():
        if costs:
            wall = spread_of([cost.seconds for cost in costs])
            turns.append(
                f"| {name} | {wall.median:.2f} s | {wall.min:.2f}-{wall.max:.2f} "
                f"| {median(cost.busy for cost in costs):.1f} s "
                f"| {max(cost.own for cost in costs) / 1e6:,.0f} "
                f"| {median(cost.serving for cost in costs):.1f} s |"
            )
    return "\n\n".join([title, "\n".join(rows), "\n".join(turns)])
