"""The same work once: ten images on one base, and ten unpacks of one image at once.

What is compared is time on a processor, of all processes, with one unpack of one image. Ten commands
also start ten times: what a command takes that finds all done is measured too, and taken off.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.contenders import LAMINA
from benchmarks.costs import Cost
from benchmarks.group import Command, Group, Step, group
from benchmarks.images import Image, made_or_found, packed_layers
from benchmarks.packing import blobs_of, pack_layer, write_layout
from benchmarks.synthetic import Shape, made_layers
from benchmarks.unpack import folder_for_images, round_robin

__all__ = ["Multiple", "at_once", "images_on", "main", "multiples"]

_TEN = 10
_OWN = (20, 1 << 17)
"""Files and bytes that each of the images has above the base."""
_MOST = 1.1


@dataclass(frozen=True)
class Multiple:
    """Some work as a multiple of the work of one."""

    what: str
    seconds: float
    value: float

    def __str__(self) -> str:
        mark = "!" if self.value > _MOST else " "
        return f"{mark} {self.value:5.2f} times the work of one ({self.seconds:.2f} s)  {self.what}"


def main(arguments: Sequence[str]) -> int:
    """Measure, and return 1 if a multiple is more than it may be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sharing", description=__doc__)
    parser.add_argument("image", nargs="?", default="large", help="as of `unpack` (large)")
    parser.add_argument("--backend", default="overlay")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, after one to warm up (3)")
    parser.add_argument(
        "--images", type=Path, help="keep the image made in this folder, or use it there"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    with folder_for_images(options.images) as folder, folder_for_images(None) as beside:
        layout = beside / "ten"
        images_on(made_or_found(options.image, folder), layout, _TEN)
        turns = {name: partial(_timed, work, layout, options.backend) for name, work in _WORKS.items()}
        costs, left_out = round_robin(turns, options.repeat)
    for name, why in left_out.items():
        print(f"{name}: {why}", file=sys.stderr)
    if left_out:
        return 1
    found = multiples({name: median(cost.busy for cost in runs) for name, runs in costs.items()})
    print(*found, sep="\n")
    if options.json:
        options.json.write_bytes(msgspec.json.encode([asdict(each) for each in found]) + b"\n")
    return int(any(each.value > _MOST for each in found))


def multiples(busy: Mapping[str, float]) -> Sequence[Multiple]:
    """Return what each work is of that of one. `busy` is seconds on a processor by work."""
    one, command, idle = busy["one caller"], busy["one command"], busy["a command that finds all done"]
    ten = busy["ten commands, one image"]
    found = [Multiple(what, busy[what], busy[what] / one) for what in _OF_CALLERS]
    net = Multiple(
        "ten commands, one image, less their starts", ten, (ten - _TEN * idle) / (command - idle)
    )
    return [*found, net]


def images_on(image: Image, out: Path, count: int) -> Mapping[str, str]:
    """Make a layout of images that all have one as their base; return the diff ID of the top of each."""
    blobs_of(out).mkdir(parents=True)
    for layer in image.layers:
        _place(layer.path, blobs_of(out) / layer.path.name)
    made = made_layers(Shape(count, *_OWN)).values()
    own = {_name(number): pack_layer(out, make, "gzip") for number, make in enumerate(made)}
    base = packed_layers(image)
    write_layout(out, {name: {**base, "own": layer} for name, layer in own.items()})
    return {name: layer.diff_id for name, layer in own.items()}


def _name(number: int) -> str:
    return f"bench.example/ten/image:{number}"


def _place(blob: Path, target: Path) -> None:
    try:
        target.hardlink_to(blob)
    except OSError:  # of another file system
        shutil.copyfile(blob, target)


# -- the works ----------------------------------------------------------------------------------

_Work = Callable[[Group, Path, str], Sequence[Step]]


def _timed(work: _Work, layout: Path, backend: str, folder: Path) -> Cost:
    root = folder / "root"
    with group() as processes:
        processes.run([[*LAMINA, "--root", str(root), "import", "-q", "--no-unpack", str(layout)]])
        return processes.timed(*work(processes, root, backend))


def _callers(numbers: Sequence[int], _: Group, root: Path, backend: str) -> Sequence[Step]:
    names = [_name(number) for number in numbers]
    return [[[sys.executable, "-m", "benchmarks.callers", "unpack", str(root), backend, *names]]]


def _command(root: Path, backend: str) -> Sequence[str]:
    how = ("-q", "--snapshotter", backend, "--durability", "lazy")
    return [*LAMINA, "--root", str(root), "unpack", *how, _name(0)]


def _one_command(_: Group, root: Path, backend: str) -> Sequence[Step]:
    return [[_command(root, backend)]]


def _done_before(processes: Group, root: Path, backend: str) -> Sequence[Step]:
    processes.run([_command(root, backend)])
    return [[_command(root, backend)]]


def _ten_commands(_: Group, root: Path, backend: str) -> Sequence[Step]:
    return [[at_once(_TEN, _command(root, backend))]]


def at_once(count: int, command: Command) -> Command:
    """Return what runs a command so often at once, and fails if one of them does."""
    return ["sh", "-c", 'seq "$0" | xargs -P 0 -I{} "$@"', str(count), *command]


_OF_CALLERS = ("ten images on one base", "ten callers, one image")
_WORKS: Mapping[str, _Work] = {
    "one caller": partial(_callers, [0]),
    "ten images on one base": partial(_callers, range(_TEN)),
    "ten callers, one image": partial(_callers, [0] * _TEN),
    "one command": _one_command,
    "a command that finds all done": _done_before,
    "ten commands, one image": _ten_commands,
}
