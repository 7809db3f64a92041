"""Callers in one process: `python -m benchmarks.callers ROOT BACKEND IMAGE...` unpacks all at once."""

import sys
from collections.abc import Sequence
from functools import partial

import trio

import engine


async def main(root: str, backend: str, names: Sequence[str]) -> None:
    """Unpack every image that is named, each for a caller of its own."""
    async with engine.open_engine(root, durability="lazy") as opened, trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(partial(opened.unpack, name, snapshotter=backend))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3:])
