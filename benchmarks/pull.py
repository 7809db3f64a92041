"""Images from a registry to root file systems that can be mounted, beside containerd.

IMAGE is as of `unpack`. Debian's docker-registry serves it on loopback, with a processor account of its
own; all turns have a new file system in memory, and a daemon that was just started. Figures:

    peer     one pull, beside containerd's
    far      one pull with 20 ms and 100 MB/s between, beside transfer and unpack
    callers  ten pulls of one image at once, in one process and in ten
    again    a pull of an image that is there (with `peer`)
    base     twenty images on one base, beside twenty pulls by containerd

Needs root, docker-registry, skopeo and containerd. Exits 1 if a figure is over its target.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.contenders import LAMINA
from benchmarks.group import Command, Group, Step, group
from benchmarks.images import Image, made_or_found, packed_layers
from benchmarks.machine import about
from benchmarks.peers import containerd
from benchmarks.pulled import BEGIN, END, PullCost, PullReport, figures, markdown, merged
from benchmarks.registry import Registry, serving
from benchmarks.render import add_outputs, check_outputs
from benchmarks.sharing import at_once, images_on
from benchmarks.tables import placed
from benchmarks.unpack import folder_for_images, listed, round_robin
from engine.oci.digest import Digest
from engine.oci.identity import chain_ids

__all__ = ["main"]

_TEN, _TWENTY = 10, 20
_LATENCY, _RATE = 0.02, 100e6
_BACKEND = "overlay"


def main(arguments: Sequence[str]) -> int:
    """Measure what the options ask for, or show what was measured before."""
    options = _parser().parse_args(arguments)
    check_outputs(options)
    if options.read:
        report = merged([msgspec.json.decode(f.read_bytes(), type=PullReport) for f in options.read])
    else:
        report = _measured(options)
    found = figures(report)
    print(*found, sep="\n")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if options.markdown:
        page = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(placed(page, markdown(report), BEGIN, END))
    if options.plot:
        from benchmarks.plot import draw_shares  # which alone needs matplotlib

        bounded = {f"{f.what}: {f.value:.2f}": f.value / f.most for f in found if f.most}
        draw_shares(f"pulls of {report.image}", bounded, options.plot)
    return int(bool(report.left_out) or any(figure.misses for figure in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pull",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", nargs="?", default="large", metavar="IMAGE", help="(large)")
    parser.add_argument(
        "--figure", type=listed(*_FIGURES), default=list(_FIGURES), help=f"{','.join(_FIGURES)} (all)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, after one to warm up (3)")
    parser.add_argument(
        "--images", type=Path, help="keep the image made in this folder, or use it there"
    )
    parser.add_argument("--read", nargs="+", type=Path, help="show what --json wrote instead")
    add_outputs(parser)
    return parser


def _measured(options: argparse.Namespace) -> PullReport:
    with (
        folder_for_images(options.images) as folder,
        folder_for_images(None) as beside,
        serving(beside) as registry,
        registry.far(_LATENCY, _RATE) as far,
    ):
        image = made_or_found(options.image, folder)
        packed = sum(layer.size for layer in image.layers)
        many = images_on(image, beside / "many", _TWENTY) if "base" in options.figure else {}
        scene = _scene(image, beside / "many", many, registry, far)
        works = {name: work for figure in options.figure for name, work in _FIGURES[figure].items()}
        turns = {name: partial(_timed, scene, work) for name, work in works.items()}
        costs, left_out = round_robin(turns, options.repeat)
    return PullReport(about(["ctr"]), image.name, packed, _LATENCY, _RATE, costs, left_out)


@dataclass(frozen=True)
class Scene:
    """References of one image, near and far, and of many on it; the chain IDs of all."""

    registry: Registry
    near: str
    far: str
    many: Sequence[str]
    chain: str
    tops: Sequence[str]

    def chains(self, *, is_many: bool) -> Sequence[str]:
        """Return the chain IDs of the one image, or of the many."""
        return self.tops if is_many else [self.chain]


def _scene(image: Image, layout: Path, many: Mapping[str, str], registry: Registry, far: str) -> Scene:
    """Have a registry hold an image and those on it, which are `many` tops by their tag in a layout."""
    base = [Digest(layer.diff_id) for layer in packed_layers(image).values()]
    return Scene(
        registry=registry,
        near=registry.push(image.layout, image.tag, "bench/one:latest"),
        far=f"{far}/bench/one:latest",
        many=[registry.push(layout, tag, f"bench/many:{n}") for n, tag in enumerate(many)],
        chain=chain_ids(base)[-1],
        tops=[chain_ids([*base, Digest(top)])[-1] for top in many.values()],
    )


# -- the works ----------------------------------------------------------------------------------

Work = Callable[[Scene, Group, Path], AbstractContextManager[Sequence[Step]]]
"""Makes all ready in an empty folder, gives what to time, and fails if not all is unpacked then."""


def _timed(scene: Scene, work: Work, folder: Path) -> PullCost:
    with (
        group() as processes,
        work(scene, processes, folder) as steps,
        scene.registry.watched() as served,
    ):
        cost = processes.timed(*steps)
    (by,) = served
    return PullCost(**asdict(cost), serving=by.busy, requests=by.requests, sent=by.sent)


_Make = Callable[[Scene, Path], Step]


def _ours(timed: _Make, *, before: _Make | None = None, is_many: bool = False) -> Work:
    @contextmanager
    def work(scene: Scene, processes: Group, folder: Path) -> Iterator[Sequence[Step]]:
        if before:
            processes.run(before(scene, folder))
        yield [timed(scene, folder)]
        usage = [*_lamina(folder), "snapshots", "usage", "-q", "--snapshotter", _BACKEND]
        processes.run([[*usage, *scene.chains(is_many=is_many)]])

    return work


def _by_containerd(*, is_many: bool) -> Work:
    @contextmanager
    def work(scene: Scene, processes: Group, folder: Path) -> Iterator[Sequence[Step]]:
        with containerd(folder, processes) as client:
            names = scene.many if is_many else [scene.near]
            yield [[[*client, "images", "pull", "--plain-http", name]] for name in names]
            for chain in scene.chains(is_many=is_many):
                processes.run([[*client, "snapshots", "info", chain]])

    return work


@contextmanager
def _receiver(scene: Scene, _: Group, __: Path) -> Iterator[Sequence[Step]]:
    yield [[[sys.executable, "-m", "benchmarks.receiver", scene.far]]]


def _lamina(folder: Path) -> Command:
    return [*LAMINA, "--root", str(folder / "root")]


def _how(durability: str) -> Command:
    return ["-q", "--snapshotter", _BACKEND, "--durability", durability]


def _pull(scene: Scene, folder: Path, *, durability: str = "full", is_far: bool = False) -> Step:
    name = scene.far if is_far else scene.near
    return [[*_lamina(folder), "pull", *_how(durability), name]]


def _fetch(scene: Scene, folder: Path) -> Step:
    return [[*_lamina(folder), "pull", "-q", "--no-unpack", scene.near]]


def _unpack(scene: Scene, folder: Path) -> Step:
    return [[*_lamina(folder), "unpack", *_how("full"), scene.near]]


def _callers(names: Callable[[Scene], Sequence[str]]) -> _Make:
    def step(scene: Scene, folder: Path) -> Step:
        root = str(folder / "root")
        return [[sys.executable, "-m", "benchmarks.callers", "pull", root, _BACKEND, *names(scene)]]

    return step


def _processes(scene: Scene, folder: Path) -> Step:
    (command,) = _pull(scene, folder, durability="lazy")
    return [at_once(_TEN, command)]


_FIGURES: Mapping[str, Mapping[str, Work]] = {
    "peer": {
        "full": _ours(_pull),
        "lazy": _ours(partial(_pull, durability="lazy")),
        "ctr": _by_containerd(is_many=False),
    },
    "far": {
        "far": _ours(partial(_pull, is_far=True)),
        "transfer": _receiver,
        "unpack": _ours(_unpack, before=_fetch),
    },
    "callers": {
        "one caller": _ours(_callers(lambda scene: [scene.near])),
        "ten callers": _ours(_callers(lambda scene: [scene.near] * _TEN)),
        "ten processes": _ours(_processes),
    },
    "again": {"again": _ours(_pull, before=_pull)},
    "base": {
        "twenty": _ours(_callers(lambda scene: scene.many), is_many=True),
        "twenty by ctr": _by_containerd(is_many=True),
    },
}
