"""Layers that are made of nothing but a seed: the shapes that real images rarely show alone.

No network, no file of this machine: the same shape gives the same bytes everywhere.
"""

import random
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks.packing import LayerMaker

__all__ = ["SHAPES", "Shape", "made_layers"]

_PER_FOLDER = 50
_POOL = 32 << 20  # far more than gzip's window of 32 KiB, and than zstd's of 2 MiB at its level 3
_WORDS = 1000  # of which text packs to a little over a quarter, as real layers do
_MADE = 1_600_000_000


@dataclass(frozen=True)
class Shape:
    """An image: how many layers, and of each how many files of how many bytes together."""

    layers: int
    files: int
    size: int


SHAPES: Mapping[str, Shape] = {
    "one-file": Shape(1, 1, 1 << 30),
    "many-files": Shape(1, 100_000, 200 << 20),
    "big-layer": Shape(1, 40_000, 1 << 30),
    "equal-layers": Shape(32, 1_000, 32 << 20),
    "deep": Shape(128, 100, 2 << 20),
}


def made_layers(shape: Shape) -> Mapping[str, LayerMaker]:
    """Return the layers of an image, bottom first."""
    return {f"layer {n}": partial(_write, shape, n) for n in range(shape.layers)}


def _write(shape: Shape, number: int, plain: Path) -> None:
    with plain.open("wb") as file:
        for piece in _archive(shape, number):
            file.write(piece)


def _archive(shape: Shape, number: int) -> Iterator[bytes | memoryview]:
    """Yield a layer: folders of files, and one file that the layers above replace."""
    chance = random.Random(number)
    written = 0
    sizes = _sizes(chance, shape)
    top = f"opt/layer-{number:03}"
    for folder in ("etc", "opt", top):
        yield _header(folder, tarfile.DIRTYPE)
    for position, size in enumerate(sizes):
        folder = f"{top}/package-{position // _PER_FOLDER:04}"
        if position % _PER_FOLDER == 0:
            yield _header(folder, tarfile.DIRTYPE)
        yield _header(f"{folder}/module_{position:06}.py", tarfile.REGTYPE, size)
        yield from _text(chance, size)
        written += size
    note = f"the topmost is layer {number}\n".encode()
    yield _header("etc/layer", tarfile.REGTYPE, len(note))
    yield note + bytes(-len(note) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _sizes(chance: random.Random, shape: Shape) -> list[int]:
    """Return sizes that add up to the shape's: many small files, some large ones. Integers only."""
    weights = [chance.randrange(1, 1000) ** 3 for _ in range(shape.files)]
    total = sum(weights)
    sizes = [shape.size * weight // total for weight in weights]
    sizes[-1] += shape.size - sum(sizes)
    return sizes


def _header(name: str, kind: bytes, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mtime = kind, size, _MADE
    member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _text(chance: random.Random, size: int) -> Iterator[bytes | memoryview]:
    """Yield the content of a file and its padding, from anywhere in the pool."""
    pool, left = _pool(), size
    while left:
        start = chance.randrange(len(pool) // 2)
        piece = pool[start : start + left]
        yield piece
        left -= len(piece)
    yield bytes(-size % tarfile.BLOCKSIZE)


@cache
def _pool() -> memoryview:
    """Return text that packs about as well as the files of real images."""
    chance = random.Random("pool")
    words = [chance.randbytes(chance.randrange(1, 7)).hex().encode() for _ in range(_WORDS)]
    text = bytearray()
    while len(text) < _POOL:
        text += b" ".join(chance.choices(words, k=10 * _WORDS)) + b"\n"
    return memoryview(text)[:_POOL].toreadonly()
