"""`python -m benchmarks`: time tools on one image, alternating, each run on a fresh file system.

`python -m benchmarks hostile` measures images that are meant to cost much instead (`hostile.py`), and
`python -m benchmarks store` what a large store costs (`store.py`).
Needs root. What is compared is the ratio of medians; absolute times are this machine's.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import hostile, store
from benchmarks.chart import bars
from benchmarks.contenders import CONTENDERS, DEFAULT, Run
from benchmarks.corpus import build
from benchmarks.fresh import fresh_file_system


def main() -> None:
    """Run the comparison that the options ask for."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing is left
    for other in (hostile, store):
        if sys.argv[1:2] == [other.__name__.rpartition(".")[2]]:
            sys.exit(other.main(sys.argv[2:]))
    options = _options()
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as holder:
        archive = options.archive or _made(Path(holder), options.set)
        results = _alternate(options.tools, archive, options.runs)
    _report(results, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--set", choices=["small", "large"], default="large")
    parser.add_argument("--archive", type=Path, help="an OCI archive, its layout beside it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tools", nargs="+", choices=CONTENDERS, default=list(DEFAULT))
    parser.add_argument("--json", type=Path, help="write all runs here")
    parser.add_argument("--svg", type=Path, help="draw the medians here")
    return parser.parse_args()


def _made(folder: Path, image_set: str) -> Path:
    print(f"making the {image_set} image", file=sys.stderr)
    build(folder / image_set, image_set, "gzip")
    return folder / f"{image_set}.tar"


def _alternate(tools: list[str], archive: Path, runs: int) -> dict[str, list[Run]]:
    """Run the tools in turn, so that a slow minute of the machine hits all; the first round warms up."""
    results: dict[str, list[Run]] = {tool: [] for tool in tools}
    for number in range(runs + 1):
        for tool in tools:
            with fresh_file_system() as folder:
                run = CONTENDERS[tool](archive, folder)
            print(f"{number or 'warm-up'}  {tool}: {run.seconds:.2f} s", file=sys.stderr)
            if number:
                results[tool].append(run)
    return results


def _report(results: dict[str, list[Run]], options: argparse.Namespace) -> None:
    seconds = {tool: [run.seconds for run in runs] for tool, runs in results.items()}
    base = median(list(seconds.values())[-1])
    print(f"{'median':>8} {'min':>7} {'max':>7} {'ratio':>6} {'peak':>8}")
    for tool, times in seconds.items():
        peak = max(run.peak_bytes for run in results[tool]) / 1e6
        middle = median(times)
        print(
            f"{middle:7.2f}s {min(times):6.2f}s {max(times):6.2f}s {middle / base:6.2f} "
            f"{peak:5.0f} MB  {tool}"
        )
    if options.json:
        about = {"machine": platform.platform(), "set": options.set, "runs": seconds}
        options.json.write_text(json.dumps(about, indent=2) + "\n")
    if options.svg:
        options.svg.write_text(bars(f"{options.set} image: import and unpack", seconds))


if __name__ == "__main__":
    main()
