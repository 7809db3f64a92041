"""From an image to a root file system: lamina beside other tools, and beside the machine's limits.

IMAGE is a corpus by name (small large one-file many-files big-layer equal-layers deep), packed as in
`large:zstd` (gzip unless told), or the path of an OCI layout or archive. Each run has a new file system
in memory; contenders take turns, and a first round warms up. A tool that is missing is told and left
out. Needs root.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

from benchmarks.contenders import STAGES, Contender, Unable, lamina
from benchmarks.contents import read_contents
from benchmarks.cores import CORES
from benchmarks.costs import Cost
from benchmarks.fresh import MEMORY, fresh_file_system, prefix
from benchmarks.group import Failed, group
from benchmarks.images import Image, made_or_found
from benchmarks.machine import about
from benchmarks.peers import PEERS, SYNC, peers
from benchmarks.render import add_outputs, check_outputs, write_outputs
from benchmarks.report import Measured, Report, Runs
from benchmarks.rooflines import rooflines
from benchmarks.tables import text

__all__ = ["folder_for_images", "listed", "main", "parser", "round_robin", "timed"]

_C = TypeVar("_C", bound=Cost)

CACHES = ("warm", "cold")
DURABILITY = ("lazy", "full")


def main(arguments: Sequence[str]) -> int:
    """Measure what the options ask for; return 1 if lamina failed anywhere."""
    options = parser().parse_args(arguments)
    check_outputs(options)
    told: list[Runs] = []
    contenders = list(chosen(options, told))
    missing = {"none", *(runs.name for runs in told)}
    here = [name for name in options.peer if name not in missing]
    how = {"repeats": options.repeat, "caches": options.cache}
    report = Report(about(here), {key: str(value) for key, value in how.items()})
    with folder_for_images(options.images) as folder:
        for word in options.image:
            measured = measure(made_or_found(word, folder), contenders, told, options)
            report.images.append(measured)
            print(text(measured), flush=True)
            write_outputs(report, options)  # after each image, so that an end by force costs one
    return int(any(runs.is_ours and runs.left_out for m in report.images for runs in m.contenders))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("image", nargs="+", metavar="IMAGE")
    peer_names = (*PEERS, *(f"{name}{SYNC}" for name in PEERS))
    found.add_argument(
        "--backend",
        type=listed(),
        default=["overlay"],
        help="of lamina: overlay,copy,aufs,... (overlay)",
    )
    found.add_argument(
        "--peer",
        type=listed(*peer_names, "none"),
        default=["ctr", "tar"],
        help=f"{','.join(PEERS)} (ctr,tar), or none; NAME{SYNC} is one and a flush of what it wrote",
    )
    found.add_argument(
        "--stage", type=listed(*STAGES), default=list(STAGES), help="unpack,import (both)"
    )
    found.add_argument(
        "--durability",
        type=listed(*DURABILITY),
        default=list(DURABILITY),
        help="of lamina: lazy,full (both)",
    )
    found.add_argument("--cache", choices=CACHES, default="warm", help="the kernel's, before each run")
    found.add_argument("--repeat", type=int, default=5, help="runs of each, after one to warm up (5)")
    found.add_argument(
        "--images", type=Path, help="keep the images made in this folder, or use those there"
    )
    add_outputs(found)
    return found


def listed(*choices: str) -> Callable[[str], list[str]]:
    """Return the type of an option that takes words with commas between them."""

    def words(value: str) -> list[str]:
        found = list(dict.fromkeys(filter(None, value.split(","))))
        strange = [word for word in found if choices and word not in choices]
        if strange or not found:
            raise argparse.ArgumentTypeError(
                f"{', '.join(strange) or 'nothing'}; one of {' '.join(choices)}"
            )
        return found

    return words


def chosen(options: argparse.Namespace, told: list[Runs]) -> Iterator[Contender]:
    """Yield who takes part; `told` gets who can't."""
    for durability, stage in product(options.durability, options.stage):
        for backend in options.backend:
            yield lamina(backend, stage, durability)
    for name in options.peer:
        if name == "none":
            continue
        try:
            yield from peers(name, options.stage)
        except Unable as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            told.append(Runs(name, "", left_out=str(error)))


@contextmanager
def folder_for_images(kept: Path | None) -> Iterator[Path]:
    """Give the folder that images are made in: in memory, unless they are to be kept."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix=prefix("images"), dir=MEMORY) as folder:
            yield Path(folder)


def measure(
    image: Image, contenders: Sequence[Contender], told: Sequence[Runs], options: argparse.Namespace
) -> Measured:
    """Run rooflines and contenders in turn on one image."""
    print(f"reading {image.name}", file=sys.stderr)
    contents = read_contents(image)
    limits = rooflines(image, contents)
    turns: dict[str, Callable[[Path], Cost]] = dict(limits)
    for contender in contenders:
        turns[_turn(contender)] = partial(timed, contender, image, cache=options.cache)
    costs, left_out = round_robin(turns, options.repeat)
    runs = [
        Runs(c.name, c.stage, c.is_ours, costs.get(_turn(c), []), left_out.get(_turn(c), ""))
        for c in contenders
    ]
    return Measured(
        image=image.name,
        layers=len(image.layers),
        packed=sum(layer.size for layer in image.layers),
        size=contents.size,
        entries=contents.entries,
        cores=CORES,
        rooflines={name: costs[name] for name in limits},
        contenders=[*runs, *told],
    )


def _turn(contender: Contender) -> str:
    return f"{contender.name}, {contender.stage}"


def timed(contender: Contender, image: Image, folder: Path, *, cache: str) -> Cost:
    """Run a contender once, and all that has to be done before."""
    with group() as processes, contender.ready(image, folder, processes) as steps:
        if cache == "cold":
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("3")
        return processes.timed(*steps)


def round_robin(
    turns: Mapping[str, Callable[[Path], _C]], repeat: int
) -> tuple[dict[str, list[_C]], dict[str, str]]:
    """Let all have their turns, so that a slow minute of the machine hits all; the first warms up.

    Return what they took, and of those that failed the reason.
    """
    costs: dict[str, list[_C]] = {name: [] for name in turns}
    left_out: dict[str, str] = {}
    for number in range(repeat + 1):
        for name, turn in turns.items():
            if name in left_out:
                continue
            try:
                with fresh_file_system() as folder:
                    cost = turn(folder)
            except (Failed, Unable) as error:
                left_out[name] = str(error)
                del costs[name]
                print(f"{name}: left out: {error}", file=sys.stderr)
                continue
            print(f"{number or 'warm-up'}  {name}: {cost.seconds:.2f} s", file=sys.stderr)
            if number:
                costs[name].append(cost)
    return costs, left_out
