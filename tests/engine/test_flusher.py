"""What layers write is flushed while they are applied; what was lost by then is not committed."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from engine import limits
from engine.callables import named
from engine.errors import EngineError, Unavailable
from engine.fs import kernel
from engine.snapshots import Kind
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.unpack.committer import Committer
from engine.unpack.flusher import Flusher
from engine.unpack.jobs import SealJob
from tests.support import applied

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

LAYER = archive(member("etc/", "5"), member("etc/passwd", data=b"root\n"))
EVERY = limits.FLUSH_EVERY_S


def unheard(_layers: int, _done: int) -> None:
    """Take note of nothing."""


class Disk:
    """A pool whose seals take a while and may fail; it notes when each began."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.seconds = 0.0
        self.fails = False

    async def seal(self, _job: SealJob) -> tuple[int, EngineError | None]:
        self.took.append(trio.current_time())
        await trio.sleep(self.seconds)
        if self.fails:
            raise Unavailable("input/output error")
        return 0, None


def timed(work: Callable[[Flusher, Disk], Awaitable[None]]) -> Disk:
    """Run work on a clock that jumps over what nobody does."""
    disk = Disk()

    async def main() -> None:
        flusher = Flusher(disk)  # type: ignore[arg-type]
        try:
            await work(flusher, disk)
        finally:
            await flusher.aclose()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return disk


def since(disk: Disk, began: float) -> list[float]:
    return [pytest.approx(at - began) for at in disk.took]


def test_what_was_written_is_flushed_now_and_then(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    told: list[int] = []
    began: list[float] = []

    async def work(flusher: Flusher, disk: Disk) -> None:
        began.append(trio.current_time())
        disk.seconds = 1.0
        with flusher.beside(backend, told.append) as progress:
            await trio.sleep(1.2 * EVERY)  # nothing was written by then
            progress(1)
            await trio.sleep(2 * EVERY + 1)
            progress(2)
            await trio.sleep(10)
        progress(3)
        await trio.sleep(10)

    disk = timed(work)
    assert told == [1, 2, 3]
    assert since(disk, began[0]) == [2 * EVERY, 4 * EVERY + 1], "not while nothing is written"


def test_it_goes_on_with_the_next_layer(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")

    async def work(flusher: Flusher, _disk: Disk) -> None:
        for _ in range(3):
            with flusher.beside(backend, lambda _read: None) as progress:
                progress(1)
                await trio.sleep(1.5 * EVERY)
            await trio.sleep(5)

    assert len(timed(work).took) == 3


def test_an_engine_that_is_closed_waits_for_no_disk(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    ended: list[float] = []

    async def work(flusher: Flusher, disk: Disk) -> None:
        disk.seconds = 1000
        with flusher.beside(backend, lambda _read: None) as progress:
            progress(1)
            await trio.sleep(2 * EVERY)
        began = trio.current_time()
        await flusher.aclose()
        ended.append(trio.current_time() - began)

    timed(work)
    assert ended == [0]


def test_who_began_before_a_flush_that_failed_is_not_committed(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    before, after = (applied(backend, [LAYER], prefix=name)[0] for name in ("before", "after"))
    told: dict[str, object] = {}

    async def work(flusher: Flusher, disk: Disk) -> None:
        disk.fails = True
        with flusher.beside(backend, lambda _read: None) as progress:
            progress(1)
            await trio.sleep(2 * EVERY)
        disk.fails = False
        committer = Committer(backend, flusher)
        for step, failures in ((before, 0), (after, 1)):
            try:
                told[step.name] = await committer.commit(step, unheard, failures)
            except EngineError as error:
                told[step.name] = str(error)

    timed(work)
    assert told == {
        before.name: "what was written could not be flushed; look at the disk",
        after.name: True,
    }
    assert backend.stat(before.key).kind is Kind.ACTIVE


def test_a_seal_that_cannot_be_flushed_fails_all_that_had_begun(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    first, other = (applied(backend, [LAYER], prefix=name)[0] for name in ("first", "other"))
    told: list[str] = []

    async def work(flusher: Flusher, disk: Disk) -> None:
        committer = Committer(backend, flusher)
        for step in (first, other):
            disk.fails = step is first
            try:
                await committer.commit(step, unheard, 0)
            except EngineError as error:
                told.append(str(error))

    timed(work)
    assert told == ["input/output error", "what was written could not be flushed; look at the disk"]


def test_a_flush_beside_the_work_is_one_syncfs(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(kernel._libc, "syncfs", lambda file: asked.append(file) or 0)
    backend = stores.snapshotter("overlay")
    flushing = backend.flushing()
    assert named(flushing.run)()(flushing.argument) == (0, None)
    assert len(asked) == 1
