"""One process of a stress run: random operations on a store, each noted before it begins and when done.

Run as a program: actor.py ROOT IMAGES LOG SEED SECONDS. What is called by this actor's own name nobody
else touches, so its notes tell what there must be of it in the end; what is called `shared` all fight
over, and may fail with it.
"""

import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from engine.app import Engine, open_engine
from engine.errors import EngineError, FailedPrecondition, InvalidArgument, NotFound, Refused
from engine.gc import collect as collecting
from engine.metadata.resources import Resource
from engine.oci.digest import Digest
from tests.conftest import AMD64
from tests.inline import workers_inline

__all__ = ["Note", "main"]

BACKENDS = ("overlay", "copy")


class Note(msgspec.Struct, frozen=True, tag_field="type"):
    """A line of the log: what was begun, and whether it is done."""

    operation: str
    key: str
    value: str
    is_done: bool


class Actor:
    """Does random things and notes them."""

    def __init__(self, engine: Engine, images: Path, log: int, seed: str) -> None:
        self._engine = engine
        self._stores = engine.stores
        self._images = sorted(images.iterdir())
        self._log = log
        self._name = seed
        self._random = random.Random(seed)
        self._number = 0
        self._named: dict[str, str] = {}  # own images, to what they were made from
        self._keys: list[str] = []
        self._leases: list[str] = []

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        operations: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._import, 4),
            (self._unpack, 3),
            (self._tag, 2),
            (self._remove, 6),
            (self._collect, 3),
            (self._prepare, 3),
            (self._release, 4),
            (self._label, 2),
            (self._verify, 2),
            (self._lease, 1),
            (self._end_lease, 2),
            (self._take, 2),
            (self._fail, 1),
            (self._share, 2),
        ]
        every = [operation for operation, weight in operations for _ in range(weight)]
        while time.monotonic() < end:
            await self._random.choice(every)()

    # -- notes --------------------------------------------------------------------------------

    def _note(self, operation: str, key: str, value: str, *, is_done: bool) -> None:
        os.write(self._log, msgspec.json.encode(Note(operation, key, value, is_done)) + b"\n")

    async def _do(
        self, operation: str, key: str, value: str, work: Callable[[], Awaitable[object]]
    ) -> None:
        self._note(operation, key, value, is_done=False)
        await work()
        self._note(operation, key, value, is_done=True)

    async def _do_sync(self, operation: str, key: str, value: str, work: Callable[[], object]) -> None:
        await self._do(operation, key, value, lambda: trio.to_thread.run_sync(work))

    def _fresh(self, kind: str) -> str:
        self._number += 1
        return f"{self._name}-{kind}-{self._number}"

    def _own(self) -> str:
        return self._random.choice(sorted(self._named)) if self._named else ""

    # -- what is its own, which has to work -----------------------------------------------------

    async def _import(self) -> None:
        source = self._random.choice(self._images)
        name = f"example.org/{self._fresh('image')}:1"
        backend = self._random.choice([None, *BACKENDS])

        async def work() -> None:
            await self._engine.import_image(source, name=name, snapshotter=backend)

        await self._do("name", name, source.name, work)
        self._named[name] = source.name

    async def _unpack(self) -> None:
        backend = self._random.choice(BACKENDS)
        if name := self._own():
            await self._do(
                "unpack", name, backend, lambda: self._engine.unpack(name, snapshotter=backend)
            )

    async def _tag(self) -> None:
        if name := self._own():
            other = f"example.org/{self._fresh('tag')}:1"

            def work() -> None:
                self._stores.images.put_all({other: self._stores.images.get(name).target})

            await self._do_sync("name", other, self._named[name], work)
            self._named[other] = self._named[name]

    async def _remove(self) -> None:
        if name := self._own():
            await self._do_sync("unname", name, "", lambda: self._stores.images.remove(name))
            del self._named[name]

    async def _collect(self) -> None:
        await self._do("collect", "", "", self._engine.collect)

    async def _prepare(self) -> None:
        if name := self._own():
            key, backend = self._fresh("key"), self._random.choice(BACKENDS)

            async def work() -> None:
                await self._engine.prepare(key, name, snapshotter=backend)

            await self._do("prepare", key, f"{backend} {self._named[name]}", work)
            self._keys.append(key)

    async def _release(self) -> None:
        if self._keys:
            key = self._keys.pop(self._random.randrange(len(self._keys)))
            await self._do("release", key, "", lambda: self._engine.release(key))

    async def _label(self) -> None:
        if name := self._own():
            label = f"example.org/{self._fresh('label')}"

            def work() -> None:
                digest = Digest(self._stores.images.get(name).target.digest)
                self._stores.content.update(digest, {label: name})

            await self._do_sync("label", label, name, work)

    async def _verify(self) -> None:
        if name := self._own():

            def work() -> None:
                image = self._stores.resolve(self._stores.images.get(name).target)
                for part in (*image.path, image.manifest.config, *image.manifest.layers):
                    self._stores.content.verify(part.key)

            await self._do_sync("verify", name, "", work)

    async def _lease(self) -> None:
        if name := self._own():
            lease = self._fresh("lease")
            digest = self._stores.images.get(name).target.digest

            def work() -> None:
                self._stores.leases.create(lease)
                self._stores.leases.add(lease, Resource("content", digest))

            await self._do_sync("lease", lease, digest, work)
            self._leases.append(lease)

    async def _end_lease(self) -> None:
        if self._leases:
            lease = self._leases.pop()
            await self._do_sync("end", lease, "", lambda: self._stores.leases.delete(lease))

    # -- what others may be at too --------------------------------------------------------------

    async def _take(self) -> None:
        """Remove any blob, which mostly is held."""

        def work() -> None:
            found = list(self._stores.content.walk())
            if found:
                with suppress(FailedPrecondition, NotFound):
                    self._stores.remove_blob(Digest(self._random.choice(found).digest))

        await self._do_sync("take", "", "", work)

    async def _fail(self) -> None:
        """Import what is broken, of which nothing may stay."""
        name = f"example.org/{self._fresh('broken')}:1"

        async def work() -> None:
            with suppress(Refused):
                await self._engine.import_image(self._images[0].parent.parent / "broken", name=name)

        await self._do("break", name, "", work)

    async def _share(self) -> None:
        name = f"example.org/shared:{self._random.randrange(3)}"
        source = self._random.choice(self._images)
        what = self._random.randrange(4)

        async def work() -> None:
            with suppress(NotFound, FailedPrecondition, InvalidArgument):
                if what == 0:
                    await trio.to_thread.run_sync(self._stores.images.remove, name)
                elif what == 1:
                    await self._engine.unpack(name, snapshotter=self._random.choice(BACKENDS))
                else:
                    await self._engine.import_image(source, name=name, replace=True)

        await self._do("share", name, str(what), work)


async def _act(root: Path, images: Path, log: int, seed: str, seconds: float) -> None:
    async with open_engine(root, platform=AMD64) as engine:
        # Some have workers of their own, which have to notice their death; they start slowly.
        if sum(seed.encode()) % 4:
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await Actor(engine, images, log, seed).run(seconds)
        else:
            await Actor(engine, images, log, seed).run(seconds)


def main(root: str, images: str, log: str, seed: str, seconds: str) -> int:
    """Act until the time is over; 1 where something fails that may not."""
    os.umask(0)
    collecting._SLICE = 1  # so that others come between
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        trio.run(_act, Path(root), Path(images), file, seed, float(seconds))
    except (EngineError, ExceptionGroup) as error:
        print(f"{seed}: {error!r}", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
