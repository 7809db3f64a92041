"""The command demo: the main job on an image that it makes itself, in a store that it throws away."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from engine import mount as mounting
from engine import plugins
from engine.app import Engine, open_engine
from engine.cli.context import action
from engine.cli.output import View, document, human_bytes, short, write
from engine.cli.running import run_loop
from engine.errors import DataLoss, EngineError, NotSupported
from engine.kv.schema import Image
from engine.snapshots import Snapshotter
from engine.testing.archives import archive, layout, member
from engine.testing.trees import TreeEntry, differences, read_tree

__all__ = ["demo"]

_FOLDERS, _FILES = 60, 50


@click.command("demo")
@action
def demo(view: View) -> None:
    """Do all of it with an image that it makes itself; nothing stays.

    It is imported, unpacked, compared, mounted and collected, without a network, in a store of its own.
    """
    with tempfile.TemporaryDirectory(prefix="lamina-demo-") as folder:
        shown = run_loop(_Demo(Path(folder), quiet=view.json or view.quiet).run)
    if view.json:
        document(shown)


class _Demo:
    def __init__(self, folder: Path, *, quiet: bool) -> None:
        self._folder = folder
        self._quiet = quiet
        self._result: dict[str, Any] = {}

    def _tell(self, *lines: str) -> None:
        if not self._quiet:
            write(lines)
            sys.stdout.flush()

    async def run(self) -> dict[str, Any]:
        async with open_engine(self._folder / "root") as engine:
            image = await self._import(engine)
            working = self._backends(engine)
            trees = {name: await self._unpack(engine, image, name) for name in working}
            self._compare(trees)
            await self._write(engine, image, working[0])
            await self._collect(engine, image)
        return self._result

    async def _import(self, engine: Engine) -> Image:
        path = layout(self._folder / "image", _layers(), tag="demo/image:1")
        size = sum(file.stat().st_size for file in (path / "blobs" / "sha256").iterdir())
        with _timed() as took:
            (image,) = (await engine.import_image(path)).images
        self._result["import"] = {"bytes": size, "seconds": took()}
        self._tell(f"made an image of 3 layers and imported it: {human_bytes(size)}, {took():.2f} s")
        return image

    def _backends(self, engine: Engine) -> list[str]:
        found = plugins.backends(engine.stores.root)
        working = [backend.name for backend in found if backend.probe.mounts]
        for backend in found:
            if not backend.probe.mounts:
                self._tell(f"{backend.name}: left out, {backend.probe.reason}")
        if not working:
            reason = "; ".join(f"{b.name}: {b.probe.reason}" for b in found)
            hint = "" if os.geteuid() == 0 else "; run the demo as root (sudo make demo)"
            raise NotSupported(f"no backend works here ({reason}){hint}")
        return working

    async def _unpack(self, engine: Engine, image: Image, name: str) -> dict[bytes, TreeEntry]:
        with _timed() as took:
            done = await engine.unpack(image.name, snapshotter=name)
        rate = done.bytes_unpacked / took()
        self._result.setdefault("unpack", {})[name] = {
            "seconds": took(),
            "bytes": done.bytes_unpacked,
            "entries": done.entries,
        }
        self._tell(
            f"{name}: unpacked {done.entries} entries, {human_bytes(done.bytes_unpacked)} "
            f"in {took():.2f} s ({human_bytes(rate)}/s)"
        )
        return self._mounted_tree(engine.stores.snapshotter(name), done.chain_id)

    def _mounted_tree(self, backend: Snapshotter, chain_id: str) -> dict[bytes, TreeEntry]:
        target = self._folder / "mnt"
        target.mkdir(exist_ok=True)
        mounts = backend.view("demo view", chain_id)
        try:
            with mounting.mounted(mounts, target):
                return read_tree(target)
        finally:
            backend.remove("demo view")
            backend.cleanup()

    def _compare(self, trees: dict[str, dict[bytes, TreeEntry]]) -> None:
        first, *others = trees
        for other in others:
            different = differences(trees[first], trees[other])
            if different:
                raise DataLoss(f"{first} and {other} differ: {different[0]}")
        self._result["equal"] = list(trees)
        count = len(trees[first])
        self._tell(f"the trees of {', '.join(trees)} are equal: all {count} entries, byte for byte")

    async def _write(self, engine: Engine, image: Image, name: str) -> None:
        """Write through a mount of a snapshot of its own, as a container would."""
        mounts = await engine.prepare("demo container", image.name, snapshotter=name)
        target = self._folder / "mnt"
        with mounting.mounted(mounts, target):
            (target / "written").write_text("by the demo\n")
            names = sorted(path.name for path in target.iterdir())
        self._tell(f"mounted it with {name} and wrote to it; / has {', '.join(names)}")
        self._draw(engine.stores.snapshotter(name))
        await engine.release("demo container", snapshotter=name)

    def _draw(self, backend: Snapshotter) -> None:
        infos = {info.key: info for info in backend.walk()}
        lines, below = [backend.name], ""
        while above := next((i for i in infos.values() if i.parent == below), None):
            size = human_bytes(backend.usage(above.key).size)
            lead = "    " * (len(lines) - 1) + "└── "
            lines.append(f"{lead}{short(above.key) or above.key}  {above.kind}, {size}")
            below = above.key
        self._tell(*lines)

    async def _collect(self, engine: Engine, image: Image) -> None:
        engine.stores.images.remove(image.name)
        with _timed() as took:
            gone = await engine.collect()
        left = list(engine.stores.content.walk())
        left_snapshots = [s for b in engine.stores.snapshotters() for s in b.walk()]
        if left or left_snapshots:
            raise EngineError(f"{len(left)} blobs and {len(left_snapshots)} snapshots stayed")
        self._result["gc"] = {
            "blobs": len(gone.blobs),
            "snapshots": len(gone.snapshots),
            "seconds": took(),
        }
        self._tell(
            f"removed its name and collected: {len(gone.blobs)} blobs, {len(gone.snapshots)} "
            f"snapshots gone in {took():.2f} s, nothing left"
        )


@contextmanager
def _timed() -> Iterator[Any]:
    start = time.perf_counter()
    end: list[float] = []

    def took() -> float:
        return (end[0] if end else time.perf_counter()) - start

    try:
        yield took
    finally:
        end.append(time.perf_counter())


def _layers() -> list[bytes]:
    """Return a base, a layer that changes and hides parts of it, and one of special files."""
    text = b"All work and no play makes a layer a dull tree.\n" * 2000
    base = [member("etc/", "5", mode=0o755), member("tmp/", "5", mode=0o1777)]
    for number in range(_FOLDERS):
        folder = f"usr/share/{number:02}"
        base.append(member(f"{folder}/", "5", mode=0o755))
        base += [
            member(f"{folder}/{file:02}", data=b"%d %d\n" % (number, file) + text[: 300 * file])
            for file in range(_FILES)
        ]
    changes = [
        member("etc/motd", data=b"from the second layer\n"),
        member("usr/share/.wh.00"),
        member("usr/share/01/.wh..wh..opq"),
        member("usr/share/01/only", data=b"left\n"),
        member("usr/share/02", data=b"a file where a folder was\n"),
    ]
    specials = [
        member("data/one", data=text),
        member("data/two", "1", link="data/one"),
        member("data/set-uid", data=b"#!/bin/sh\n", mode=0o4755, uid=1000, gid=1000),
        member("data/link", "2", link="../etc/motd"),
        member("data/pipe", "6"),
        member("data/note", pax={b"SCHILY.xattr.user.note": b"kept", b"mtime": b"1234567890.123456789"}),
    ]
    return [archive(*base), archive(*changes), archive(*specials)]
