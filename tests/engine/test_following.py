"""Layers are applied while their bytes arrive: in any order, whoever fails or leaves, all or nothing."""

import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.app import Engine, open_engine
from engine.beside import beside
from engine.content.growing import BATCH
from engine.content.image import ResolvedImage, resolve
from engine.content.writer import Writer
from engine.errors import DigestMismatch, EngineError, Refused
from engine.kv.schema import EXTENT
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor, parse_index
from engine.progress import silent
from engine.testing.archives import archive, layout, member
from engine.unpack.lease import HeldLease, begun_lease
from engine.unpack.slots import Slots
from engine.unpack.unpacker import Unpacked
from tests.conftest import AMD64, children
from tests.engine.test_unpack import actives, folders, run

pytestmark = pytest.mark.root
PIECE = EXTENT // 2


@dataclass
class Coming:
    """An image none of whose layers is in the store yet, and what writes them."""

    engine: Engine
    image: ResolvedImage
    layers: dict[Digest, bytes]
    lease: HeldLease
    writers: dict[Digest, Writer] = field(default_factory=dict)

    @property
    def digests(self) -> list[Digest]:
        return [layer.descriptor.key for layer in self.image.layers]

    @asynccontextmanager
    async def bringing(self) -> AsyncIterator[None]:
        arrivals = self.engine._shop.arrivals
        with arrivals.bringing("default", self.digests) as self.arrivals:
            try:
                yield
            finally:
                while self.writers:
                    self.writers.popitem()[1].close()

    def write(self, position: int, size: int = PIECE) -> bool:
        """Write some of a layer and tell; commit it after the last byte, and say so."""
        digest = self.digests[position]
        content, data = self.engine.stores.content, self.layers[digest]
        arrival = self.arrivals[digest]
        if arrival.is_whole:
            return True
        if digest not in self.writers:
            self.writers[digest] = content.ingest(
                digest, lease=self.lease.id, expected=digest, total=len(data)
            )
        writer = self.writers[digest]
        writer.write(data[writer.offset : writer.offset + size])
        arrival.tell(*writer.durable)
        if writer.offset == len(data):
            arrival.come(writer.commit())
            return True
        return False

    async def unpack(self) -> Unpacked:
        backend = self.engine.stores.snapshotter("overlay")
        return await self.engine._unpacker.unpack(
            self.image, backend, self.lease, silent, arrivals=self.arrivals
        )


_unique = count()


def random_layers(sizes: Iterable[int]) -> list[bytes]:
    """Return layers of a file each, whose bytes no other test has."""
    return [
        archive(member(f"file-{next(_unique)}", data=os.urandom(size)), member(f"layer-{number}"))
        for number, size in enumerate(sizes)
    ]


@asynccontextmanager
async def coming(engine: Engine, folder: Path, layers: list[bytes]) -> AsyncIterator[Coming]:
    path = layout(folder, layers, compression="none")
    documents = {digest_of(file.read_bytes()): file for file in (path / "blobs/sha256").iterdir()}

    def read(descriptor: Descriptor, _limit: int) -> bytes:
        return documents[descriptor.key].read_bytes()

    (target,) = parse_index((path / "index.json").read_bytes()).manifests
    image = resolve(target, AMD64, read)
    content = engine.stores.content
    async with begun_lease(engine.stores.root.meta, "default") as lease:
        config = read(image.manifest.config, 0)
        with content.ingest("config", lease=lease.id) as writer:
            writer.write(config)
            writer.commit()
        blobs = {layer.descriptor.key: read(layer.descriptor, 0) for layer in image.layers}
        yield Coming(engine, image, blobs, lease)


def check_made(come: Coming) -> int:
    """Check that what was made is right, and that nothing is half there; return how many layers were."""
    backend = come.engine.stores.snapshotter("overlay")
    made = {info.key: info for info in backend.walk()}
    below = [name for name in come.image.chain if name in made]
    assert below == come.image.chain[: len(below)], "a layer without those below it"
    assert actives(come.engine) == []
    for position, name in enumerate(below):
        (file,) = backend_folder(come.engine, name).glob("file-*")
        assert file.read_bytes() in come.layers[come.digests[position]]
        assert file.stat().st_size in SIZES
    return len(below)


def backend_folder(engine: Engine, name: str) -> Path:
    backend = engine.stores.snapshotter("overlay")
    backend.view(f"look {name}", name)
    try:
        (mount,) = backend.mounts(f"look {name}")
        lower = next((o for o in mount.options if o.startswith("lowerdir=")), "")
        return Path(lower.removeprefix("lowerdir=").split(":")[0] if lower else mount.source)
    finally:
        backend.remove(f"look {name}")
        backend.cleanup()


SIZES = [2 * EXTENT + 5, EXTENT // 3, EXTENT]


async def until_some_is_written(engine: Engine) -> int:
    """Wait until a worker has written something of a file; return how much."""
    with trio.fail_after(20):
        while True:
            sizes = [f.stat().st_size for folder in folders(engine) for f in folder.glob("fs/file-*")]
            if any(sizes):
                return max(sizes)
            await trio.sleep(0.01)


def test_a_layer_is_applied_while_it_comes(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        async with (
            coming(engine, tmp_path / "image", random_layers(SIZES)) as come,
            come.bringing(),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(come.unpack)
            come.write(0, EXTENT)
            assert await until_some_is_written(engine) < SIZES[0]
            for position in (0, 2, 1):
                while not come.write(position):
                    pass
        assert check_made(come) == 3

    run(tmp_path, work)


def test_who_waits_for_bytes_keeps_nobody_from_work(tmp_path: Path) -> None:
    """More layers have begun to come than there are places; those that are whole are applied first."""

    async def work(engine: Engine) -> None:
        engine._shop.pool.slots = Slots(1)
        sizes = [SIZES[0], SIZES[0], SIZES[1]]
        async with (
            coming(engine, tmp_path / "image", random_layers(sizes)) as come,
            come.bringing(),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(come.unpack)
            for position in (0, 1):
                come.write(position, EXTENT)
                await until_some_is_written(engine)
            while not come.write(2):
                pass
            with trio.fail_after(20):
                while not any((folder / "outline").exists() for folder in folders(engine)):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            for position in (1, 0):
                while not come.write(position):
                    pass
        assert check_made(come) == 3

    run(tmp_path, work)


class _Given(EngineError):
    """What a test makes a layer fail with."""


EVENTS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([PIECE, EXTENT, BATCH])), max_size=20)
ENDS = st.sampled_from(["all", "all", "fails", "cancelled", "one leaves", "left undone"])


def test_any_order_any_failure_any_cancel(tmp_path: Path) -> None:
    async def one(engine: Engine, events: list[tuple[int, int]], end: str) -> None:
        scope, other = trio.CancelScope(), trio.CancelScope()
        results: list[Unpacked | EngineError] = []

        async def ask(mine: trio.CancelScope) -> None:
            with mine:
                try:
                    results.append(await come.unpack())
                except EngineError as error:
                    results.append(error)

        folder = tmp_path / f"image-{next(_unique)}"
        async with coming(engine, folder, random_layers(SIZES)) as come:
            async with trio.open_nursery() as nursery:
                try:
                    async with come.bringing():
                        nursery.start_soon(ask, scope)
                        nursery.start_soon(ask, other)
                        for position, size in events:
                            come.write(position, size)
                            await trio.lowlevel.checkpoint()
                        if end == "fails":
                            raise _Given("the source broke off")
                        if end == "cancelled":
                            other.cancel()
                        if end in {"one leaves", "cancelled"}:
                            scope.cancel()
                            await trio.lowlevel.checkpoint()
                        if end in {"all", "one leaves"}:
                            for position in range(3):
                                while not come.write(position):
                                    await trio.lowlevel.checkpoint()
                except _Given:
                    pass
            made = check_made(come)
            whole = all(come.arrivals[digest].is_whole for digest in come.digests)
            if end == "all" or (end == "one leaves" and other.cancelled_caught is False):
                assert made == 3
                assert [type(result) for result in results] == [Unpacked] * (2 if end == "all" else 1)
            elif not whole:
                assert made < 3
                assert not any(isinstance(result, Unpacked) for result in results)
            if end == "fails" and not whole:
                assert {type(result) for result in results} == {_Given}

    async def main() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            while orders:
                await one(engine, *orders.pop())

    orders: list[tuple[list[tuple[int, int]], str]] = []

    @settings(max_examples=25)
    @given(EVENTS, ENDS)
    def collect(events: list[tuple[int, int]], end: str) -> None:
        orders.append((events, end))

    collect()
    trio.run(main)


def test_bytes_that_are_not_what_was_promised_are_never_committed(tmp_path: Path) -> None:
    """The layer's own diff ID is right: only the digest of its blob tells."""

    async def work(engine: Engine) -> None:
        async with coming(engine, tmp_path / "image", random_layers([EXTENT * 2])) as come:
            digest = come.digests[0]
            come.layers[digest] = come.layers[digest][:-1] + b"!"  # in the padding at the end
            with pytest.raises((DigestMismatch, Refused)):  # noqa: PT012
                async with beside_it(come), come.bringing():
                    while not come.write(0):
                        await trio.testing.wait_all_tasks_blocked(0.01)
            assert check_made(come) == 0

    run(tmp_path, work)


@asynccontextmanager
async def beside_it(come: Coming) -> AsyncIterator[None]:
    """Unpack during the block; what that raises is expected."""

    async def unpack() -> None:
        with pytest.raises(EngineError):
            await come.unpack()

    async with beside() as nursery:
        nursery.start_soon(unpack)
        yield


def test_who_brings_a_layer_leaves_and_another_goes_on(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        async with coming(engine, tmp_path / "image", random_layers([3 * EXTENT])) as come:
            first = Coming(engine, come.image, come.layers, come.lease)
            async with come.bringing(), trio.open_nursery() as nursery:
                nursery.start_soon(come.unpack)
                async with first.bringing():
                    first.write(0, EXTENT)
                    await until_some_is_written(engine)
                while not come.write(0):
                    await trio.lowlevel.checkpoint()
            assert check_made_sizes(come, 3 * EXTENT) == 1

    run(tmp_path, work)


def _spoilt_content(data: bytes) -> bytes:
    """Return an archive whose file has other bytes."""
    return data[:600] + b"spoilt" + data[606:]


def _no_archive(data: bytes) -> bytes:
    """Return what is no archive."""
    return b"spoilt" + data[6:]


@pytest.mark.parametrize("spoilt", [_spoilt_content, _no_archive])
@pytest.mark.parametrize("ended", [True, False])
def test_bad_bytes_of_one_who_leaves_do_not_spoil_what_another_brings(
    tmp_path: Path, spoilt: Callable[[bytes], bytes], *, ended: bool
) -> None:
    async def work(engine: Engine) -> None:
        async with coming(engine, tmp_path / "image", random_layers([3 * EXTENT])) as come:
            bad = {digest: spoilt(data) for digest, data in come.layers.items()}
            first = Coming(engine, come.image, bad, come.lease)
            async with come.bringing(), trio.open_nursery() as nursery:
                with suppress(DigestMismatch):
                    async with first.bringing():
                        nursery.start_soon(come.unpack)
                        first.write(0, EXTENT)
                        await trio.testing.wait_all_tasks_blocked(0.1)
                        while ended:
                            first.write(0, EXTENT)
                            await trio.testing.wait_all_tasks_blocked(0.1)
                if not ended:
                    engine.stores.content.abort(come.digests[0])
                while not come.write(0, EXTENT):
                    await trio.testing.wait_all_tasks_blocked(0.1)
            assert check_made_sizes(come, 3 * EXTENT) == 1
            (name,) = come.image.chain
            (file,) = backend_folder(engine, name).glob("file-*")
            assert file.read_bytes() in come.layers[come.digests[0]]

    run(tmp_path, work)


def check_made_sizes(come: Coming, size: int) -> int:
    names = [info.key for info in come.engine.stores.snapshotter("overlay").walk()]
    for name in names:
        (file,) = backend_folder(come.engine, name).glob("file-*")
        assert file.stat().st_size == size
    return len(names)


def test_a_worker_that_is_told_to_stop_is_there_for_the_next_layer(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        async with coming(engine, tmp_path / "image", random_layers([3 * EXTENT])) as come:
            scope = trio.CancelScope()

            async def leaves() -> None:
                with scope:
                    await come.unpack()

            async with come.bringing(), trio.open_nursery() as nursery:
                nursery.start_soon(leaves)
                come.write(0, EXTENT)
                await until_some_is_written(engine)
                before = children()
                scope.cancel()
            assert check_made(come) == 0
            async with come.bringing(), trio.open_nursery() as nursery:
                nursery.start_soon(come.unpack)
                while not come.write(0):
                    await trio.lowlevel.checkpoint()
            assert before <= children()
            assert check_made_sizes(come, 3 * EXTENT) == 1

    run(tmp_path, work)
