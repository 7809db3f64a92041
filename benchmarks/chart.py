"""Draws medians as horizontal bars: an SVG with nothing behind it."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

_ROW, _LEFT, _WIDTH = 34, 260, 420


def bars(title: str, seconds: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG of the median of each contender, with a line from its best to its worst run."""
    longest = max(max(runs) for runs in seconds.values())
    height = 50 + _ROW * len(seconds)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>',
    ]
    for row, (name, runs) in enumerate(seconds.items()):
        y = 44 + row * _ROW
        length, low, high = (_WIDTH * value / longest for value in (median(runs), min(runs), max(runs)))
        colour = "#2a7" if name.startswith("lamina") else "#999"
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="22" fill="{colour}"/>',
            f'<line x1="{_LEFT + low:.1f}" x2="{_LEFT + high:.1f}" y1="{y + 11}" y2="{y + 11}" '
            'stroke="black"/>',
            f'<text x="{_LEFT + high + 8:.1f}" y="{y + 15}">{median(runs):.1f} s</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def against(title: str, shares: Mapping[str, float]) -> str:
    """Return an SVG of figures as shares of what they may be, which is a line; the longest are cut."""
    most, left = 2.0, 460
    at_one = left + _WIDTH / most
    height = 50 + _ROW * len(shares)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + _WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<text x="10" y="24" font-size="15">{escape(title)}: share of the target</text>',
        f'<line x1="{at_one}" x2="{at_one}" y1="36" y2="{height}" stroke="black"/>',
    ]
    for row, (name, share) in enumerate(shares.items()):
        y = 44 + row * _ROW
        length = _WIDTH * min(share, most) / most
        colour = "#2a7" if share <= 1 else "#c33"
        parts += [
            f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="22" fill="{colour}"/>',
            f'<text x="{left + length + 8:.1f}" y="{y + 15}">{share:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
