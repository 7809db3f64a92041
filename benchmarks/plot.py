"""Pictures of figures, by matplotlib, which nothing else here needs."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import STAGES
from benchmarks.report import Measured, Report, Runs

__all__ = ["draw", "draw_shares"]

mpl.rcParams["svg.hashsalt"] = "lamina"  # the same figures make the same picture
mpl.rcParams["svg.fonttype"] = "none"

_OURS, _THEIRS, _MISSED = "#2a9d6f", "#a3a9b0", "#cc3b3b"
_LINES = {"inflate": "#c77700", "hash": "#7b4fc9", "write": "#1f6fd1", "all": "#000000"}
_ROW, _WIDTH, _AROUND = 0.3, 8.5, 1.1  # inches


def draw(report: Report, path: Path) -> None:
    """Draw a field for each image: a bar for each contender, and the limits as lines."""
    rows = [_rows(measured) for measured in report.images]
    heights = [_AROUND + _ROW * (len(each) + 1) for each in rows]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    fields = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for field, measured, each in zip(fields, report.images, rows, strict=True):
        _bars(field, each)
        _limits(field, measured)
        field.set_title(
            f"{measured.image}: {measured.size / 1e6:,.0f} MB, {measured.entries:,} entries, "
            f"{measured.layers} layer{'s' * (measured.layers != 1)}",
            loc="left",
        )
    fields[-1].set_xlabel("seconds: median, best and worst; lines: each part alone, on all cores")
    _save(figure, path)


def _rows(measured: Measured) -> list[Runs]:
    return [runs for stage in STAGES for runs in measured.took_part(stage)]


def _bars(field: Axes, rows: list[Runs]) -> None:
    # A gap tells one stage from the next.
    places = [number + (runs.stage != rows[0].stage) for number, runs in enumerate(rows)]
    medians = [runs.seconds.median for runs in rows]
    low = [runs.seconds.median - runs.seconds.min for runs in rows]
    high = [runs.seconds.max - runs.seconds.median for runs in rows]
    colours = [_OURS if runs.is_ours else _THEIRS for runs in rows]
    field.barh(places, medians, xerr=(low, high), color=colours, ecolor="#333333", capsize=3, height=0.7)
    field.set_yticks(places, [f"{runs.name}, {STAGES[runs.stage]}" for runs in rows])
    field.invert_yaxis()
    field.set_xlim(0, 1.12 * max((runs.seconds.max for runs in rows), default=1))
    for place, runs in zip(places, rows, strict=True):
        text = f"{runs.seconds.median:.2f}"
        field.annotate(text, (runs.seconds.max, place), (6, 0), textcoords="offset points", va="center")
    field.spines[["top", "right"]].set_visible(False)


def _limits(field: Axes, measured: Measured) -> None:
    limits = {**measured.limits(), "all": measured.all_work()}
    for name, seconds in sorted(limits.items(), key=lambda item: item[1]):
        style = "-" if name == "all" else "--"
        field.axvline(
            seconds, color=_LINES[name], linestyle=style, linewidth=1.2, label=f"{name} {seconds:.2f}"
        )
    field.legend(loc="lower right", fontsize="small", title="limits, s", title_fontsize="small")


def draw_shares(title: str, shares: Mapping[str, float], path: Path) -> None:
    """Draw figures as shares of what they may be, which is a line; the longest are cut."""
    figure = Figure(figsize=(_WIDTH, _AROUND + _ROW * len(shares)), layout="constrained")
    field = figure.subplots()
    most, places = 2.0, range(len(shares))
    colours = [_OURS if share <= 1 else _MISSED for share in shares.values()]
    field.barh(places, [min(share, most) for share in shares.values()], color=colours, height=0.7)
    field.set_yticks(places, list(shares))
    field.invert_yaxis()
    field.set_xlim(0, 1.12 * most)
    for place, share in zip(places, shares.values(), strict=True):
        at = (min(share, most), place)
        field.annotate(f"{share:.2f}", at, (6, 0), textcoords="offset points", va="center")
    field.axvline(1, color="black", linewidth=1.2)
    field.set_title(f"{title}: share of the target", loc="left")
    field.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # The date would make each picture another.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)
