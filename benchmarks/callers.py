"""Callers in one process: `python -m benchmarks.callers WORK ROOT BACKEND NAME...`, all at once."""

import sys
from collections.abc import Sequence
from functools import partial

import trio

import engine
from engine.registry.client import Access, open_client


async def main(work: str, root: str, backend: str, names: Sequence[str]) -> None:
    """Unpack or pull every image that is named, each for a caller of its own."""
    async with (
        engine.open_engine(root, durability="lazy") as opened,
        open_client(Access()) as client,
        trio.open_nursery() as nursery,
    ):
        for name in names:
            if work == "pull":
                nursery.start_soon(partial(opened.pull, name, client, snapshotter=backend))
            else:
                nursery.start_soon(partial(opened.unpack, name, snapshotter=backend))


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
