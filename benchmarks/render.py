"""Tables, pages and pictures of runs: of the one just made, or of those that JSON files keep.

Of an image that several files have, the last counts. Markdown goes between the marks of a page that has
them (`<!-- figures -->`), and else becomes the page.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec

from benchmarks.report import Report, merged
from benchmarks.tables import markdown, placed, text

__all__ = ["add_outputs", "check_outputs", "main", "write_outputs"]


def main(arguments: Sequence[str]) -> int:
    """Show reports that were written before."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument("report", nargs="+", type=Path, help="what --json wrote")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    check_outputs(options)
    report = merged([msgspec.json.decode(path.read_bytes(), type=Report) for path in options.report])
    for measured in report.images:
        print(text(measured))
    write_outputs(report, options)
    return 0


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is written, and where."""
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--markdown", type=Path, help="write the tables here, or between a page's marks")
    parser.add_argument("--plot", type=Path, help="draw here; the suffix says how (.png, .svg)")


def check_outputs(options: argparse.Namespace) -> None:
    """Tell what is missing before anything is measured."""
    if options.plot and not find_spec("matplotlib"):
        raise SystemExit("--plot needs matplotlib: pip install --editable '.[bench]'")


def write_outputs(report: Report, options: argparse.Namespace) -> None:
    """Write what was asked for."""
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if options.markdown:
        page = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(placed(page, markdown(report)))
    if options.plot:
        from benchmarks.plot import draw  # which alone needs matplotlib

        draw(report, options.plot)
