"""The figures that lamina is held to, as far as a report has what they need. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Measured

__all__ = ["CONTAINERS", "Target", "reached"]

CONTAINERS: Mapping[str, float] = {
    "provision, `runc run` and destroy, beside `runc run` of a bundle": 1.5,
    "launch, wait and destroy, beside `runc run` of a bundle": 1.5,
    "`lamina run`, less the start of Python with its imports, beside `runc run`": 1.5,
    "provision and destroy on {layers} layers, beside `podman create` and `podman rm`": 1 / 3,
    "provision beside {many} containers, and beside none": 1.2,
    "recover of {many} containers, seconds": 2.0,
}
"""What figures of containers (`benchmarks.contained`) may be at most."""


@dataclass(frozen=True)
class Target:
    """A figure, and what it may be at most."""

    what: str
    value: float
    most: float

    @property
    def met(self) -> bool:
        """Whether it is as it should be."""
        return self.value <= self.most


Figure = Callable[[Measured], float | None]
_LAZY, _FULL = "lamina overlay lazy", "lamina overlay full"


def _beside(peer: str, stage: str = "unpack", ours: str = _LAZY) -> Figure:
    """Return our time as a share of a peer's."""

    def share(measured: Measured) -> float | None:
        mine, theirs = measured.find(ours, stage), measured.find(peer, stage)
        return mine.seconds.median / theirs.seconds.median if mine and theirs else None

    return share


def _above_limit(measured: Measured) -> float | None:
    mine = measured.find(_LAZY, "unpack")
    return mine.seconds.median / measured.highest()[1] if mine else None


def _memory(measured: Measured) -> float | None:
    found = [runs.own for runs in measured.contenders if runs.is_ours and runs.costs]
    return max(found) / 1e6 if found else None


_TARGETS: Sequence[tuple[str, str, Figure, float]] = (
    ("unpack only, gzip, beside containerd", "large:gzip", _beside("ctr"), 0.30),
    ("unpack only, gzip, beside igzip and tar", "large:gzip", _beside("tar"), 0.55),
    ("unpack only, zstd, beside containerd", "large:zstd", _beside("ctr"), 0.25),
    (
        "import and unpack, flushed, beside containerd's, which does not flush",
        "large:gzip",
        _beside("ctr", "import", _FULL),
        0.33,
    ),
    ("one layer of 1 GB, 40,000 files, beside igzip and tar", "big-layer:gzip", _beside("tar"), 0.6),
    ("100,000 small files in one layer, beside containerd", "many-files:gzip", _beside("ctr"), 0.5),
    ("unpack only, gzip, times the highest roofline", "large:gzip", _above_limit, 1.35),
    ("peak memory of all processes, MB", "large:gzip", _memory, 400),
)


def reached(images: Sequence[Measured]) -> Sequence[Target]:
    """Return those figures for which there is a measurement."""
    by_name: Mapping[str, Measured] = {measured.image: measured for measured in images}
    found = []
    for what, name, figure, most in _TARGETS:
        value = figure(by_name[name]) if name in by_name else None
        if value is not None:
            found.append(Target(what, value, most))
    return found
