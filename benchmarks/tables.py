"""Tables of what was measured: 80 columns for a terminal, Markdown for a page. Pure."""

from collections.abc import Iterable, Sequence

from benchmarks.contenders import STAGES
from benchmarks.report import Measured, Report, Runs
from benchmarks.targets import Target, reached

__all__ = ["BEGIN", "END", "markdown", "placed", "text"]

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

_HEADS = ("", "median", "min-max", "share", "limit", "MB/s", "entries/s", "CPU", "MB")
_WIDTHS = (21, 7, 10, 5, 5, 5, 9, 6, 4)
_LEGEND = (
    "share: what lamina (the first line) takes of this one's time. limit: times the\n"
    "highest limit. CPU: on a processor, all processes. MB: their own memory's peak."
)


def text(measured: Measured) -> str:
    """Return the table of an image for a terminal."""
    lines = [_title(measured), _limits(measured)]
    for stage, meaning in STAGES.items():
        rows = list(_rows(measured, stage))
        if rows:
            lines += ["", *_aligned([(meaning, *_HEADS[1:]), *rows])]
    lines += [f"left out: {why}" for why in _left_out(measured)]
    return "\n".join([*lines, "", _LEGEND, ""])


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    found = []
    for first, *others in rows:
        cells = [first.ljust(_WIDTHS[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, _WIDTHS[1:], strict=True)]
        found.append(" ".join(cells).rstrip())
    return found


def _title(measured: Measured) -> str:
    return (
        f"{measured.image}: {measured.size / 1e6:,.0f} MB in {measured.entries:,} entries, "
        f"{_count(measured.layers, 'layer')} of {measured.packed / 1e6:,.0f} MB"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _limits(measured: Measured) -> str:
    alone = ", ".join(f"{name} {_brief(seconds)} s" for name, seconds in measured.limits().items())
    cores = _count(measured.cores, "core")
    return f"limits, alone on {cores}: {alone}; all {_brief(measured.all_work())} s"


def _rows(measured: Measured, stage: str) -> Iterable[Sequence[str]]:
    base = measured.base(stage)
    _, limit = measured.highest()
    for runs in measured.took_part(stage):
        seconds = runs.seconds
        yield (
            runs.name,
            f"{_brief(seconds.median)} s",
            f"{_brief(seconds.min)}-{_brief(seconds.max)}",
            f"{base.seconds.median / seconds.median:.2f}" if base else "",
            f"{seconds.median / limit:.1f}",
            f"{measured.size / 1e6 / seconds.median:,.0f}",
            f"{measured.entries / seconds.median:,.0f}",
            f"{runs.busy:.1f} s",
            f"{runs.own / 1e6:,.0f}",
        )


def _brief(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 9.995 else f"{seconds:.1f}"


def _left_out(measured: Measured) -> Sequence[str]:
    return [f"{_named(runs)}: {runs.left_out}" for runs in measured.contenders if runs.left_out]


def _named(runs: Runs) -> str:
    return f"{runs.name} ({STAGES[runs.stage]})" if runs.stage else runs.name


# -- a page -------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Return all figures of a report as a part of a page."""
    parts = [_machine(report), _targets(reached(report.images))]
    parts += [_section(measured) for measured in report.images]
    return "\n\n".join(filter(None, parts))


def placed(page: str, part: str, first: str = BEGIN, last: str = END) -> str:
    """Return a page with the part between its marks replaced; a page without marks becomes the part."""
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    return f"{before}{begin}\n{part}\n{end}{after}" if begin and end else f"{part}\n"


def _machine(report: Report) -> str:
    about = [f"{key} {value}" for key, value in {**report.machine, **report.options}.items()]
    return f"{'; '.join(about)}."


def _targets(targets: Sequence[Target]) -> str:
    rows = [
        (
            target.what,
            f"{target.value:.2f}" if target.met else f"**{target.value:.2f}**",
            f"{target.most:g}",
        )
        for target in targets
    ]
    return _table(("figure", "measured", "at most"), rows) if rows else ""


def _section(measured: Measured) -> str:
    parts = [f"### {_title(measured)}", f"{_limits(measured)}."]
    for stage, meaning in STAGES.items():
        rows = list(_rows(measured, stage))
        if rows:
            parts.append(_table((meaning, *_HEADS[1:]), rows))
    parts += [f"Left out: {why}." for why in _left_out(measured)]
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
