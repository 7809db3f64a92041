"""Images of few bytes that are meant to cost much: layers, links and folders that multiply."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import trio

from engine.app import open_engine
from engine.testing.archives import archive, layout, member

__all__ = ["cases"]

Layer = Sequence[bytes]
UNIONS = ("overlay", "aufs")
BACKENDS = (*UNIONS, "copy")
_ANY = "any/image:1"


def _deep(depth: int) -> str:
    return "d/" * depth


def _whiteouts(layers: int, whiteouts: int, depth: int) -> Iterator[Layer]:
    """Yield a file and then nothing but whiteouts, all of them deep in folders that are implied."""
    yield [member(_deep(depth) + "f")]
    for layer in range(1, layers):
        yield [member(f"{_deep(depth)}.wh.{layer}-{number}") for number in range(whiteouts)]


def _implied(layers: int, depth: int) -> Iterator[Layer]:
    for layer in range(layers):
        yield [member(f"{_deep(depth)}{layer}")]


def _opaque(layers: int, depth: int) -> Iterator[Layer]:
    for layer in range(layers):
        marks = [member(_deep(at) + ".wh..wh..opq") for at in range(1, depth, 8)]
        yield [member(f"{_deep(depth)}{layer}"), *marks]


def _link_replaced(rounds: int) -> Iterator[Layer]:
    """Yield a layer with many open folders that replaces a link and writes through it, in turn."""
    folders = [member(f"open/{number}/f") for number in range(300)]
    turns = [member("link", "2", link=f"open/{n % 300}") for n in range(rounds)]
    files = [member(f"link/{n % 10}") for n in range(rounds)]
    yield [*folders, *(entry for turn in zip(turns, files, strict=True) for entry in turn)]


def _links_that_multiply() -> Iterator[Layer]:
    links = [member(f"L{n}", "2", link="d/../" * 100 + f"L{n + 1}") for n in range(7)]
    files = [member(f"L0/{number % 10}") for number in range(20_000)]
    yield [member("d/", "5"), *links, member("L7/", "5"), *files]


IMAGES: dict[str, tuple[Sequence[str], Callable[[], Iterator[Layer]]]] = {
    "21 layers, 101 whiteouts 170 folders deep": (BACKENDS, lambda: _whiteouts(21, 101, 170)),
    "70 layers, 101 whiteouts 250 folders deep": (UNIONS, lambda: _whiteouts(70, 101, 250)),
    "50 layers of one file 510 folders deep": (UNIONS, lambda: _implied(50, 510)),
    "100 layers, opaque marks 200 folders deep": (UNIONS, lambda: _opaque(100, 200)),
    "a link replaced and followed, 10,000 times": (BACKENDS, lambda: _link_replaced(10_000)),
    "links that multiply steps": (BACKENDS, _links_that_multiply),
}
"""Backends and layers by the name of the image."""


def import_image(name: str, folder: Path) -> None:
    """Make an image and import it to a store below `folder`."""
    layers = [archive(*members) for members in IMAGES[name][1]()]
    image = layout(folder / "image", layers)

    async def run() -> None:
        async with open_engine(folder / "root") as engine:
            await engine.import_image(image, name=_ANY)

    trio.run(run)


def unpack_image(backend: str, folder: Path) -> None:
    """Unpack the image in the store below `folder`."""

    async def run() -> None:
        async with open_engine(folder / "root") as engine:
            await engine.unpack(_ANY, snapshotter=backend)

    trio.run(run)


def cases() -> Iterator[tuple[str, Callable[[Path], object], Callable[[Path], object]]]:
    """Yield names, what makes the input and what is measured, for each image and backend."""
    for name, (backends, _) in IMAGES.items():
        for backend in backends:
            yield f"{backend}: {name}", partial(import_image, name), partial(unpack_image, backend)
