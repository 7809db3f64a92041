"""The worker pool: a dead worker costs at most its own job, and what cannot start says why."""

import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from engine.app import Engine, open_engine
from engine.errors import ResourceExhausted
from engine.testing.archives import archive, layout, member
from engine.unpack import pool
from tests.conftest import AMD64, children

pytestmark = pytest.mark.root


def run(tmp_path: Path, work: Callable[[Engine, list[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with open_engine(tmp_path / "root", platform=AMD64) as engine:
                names = []
                for number in range(2):
                    path = layout(tmp_path / str(number), [archive(member(str(number)))])
                    names.append((await engine.import_image(path, name=f"x/{number}:1")).images[0].name)
                await work(engine, names)

    trio.run(main)


def kill_all() -> set[int]:
    killed = children()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return killed


def test_idle_workers_that_died_are_replaced(tmp_path: Path) -> None:
    async def work(engine: Engine, names: list[str]) -> None:
        await engine.unpack(names[0], snapshotter="overlay")
        killed = kill_all()
        assert (await engine.unpack(names[1], snapshotter="overlay")).applied == 1
        assert killed
        assert not killed & children()

    run(tmp_path, work)


def test_however_many_idle_workers_died_none_gets_a_job() -> None:
    """A job is tried again once only: a second dead one would be its error."""

    async def main() -> None:
        fresh = pool.WorkerPool(1)
        idle = [await fresh._start() for _ in range(3)]
        killed = kill_all()
        worker = await fresh._take(idle)
        try:
            assert len(killed) >= 3
            assert worker.is_alive
            assert idle == []
            assert fresh._all == {worker}
        finally:
            await fresh.aclose()

    trio.run(main)


def test_a_job_that_never_started_is_tried_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that dies between the look at it and the job: it still counts as alive.
    monkeypatch.setattr(pool._Worker, "is_alive", True)

    async def work(engine: Engine, names: list[str]) -> None:
        await engine.unpack(names[0], snapshotter="overlay")
        kill_all()
        assert (await engine.unpack(names[1], snapshotter="overlay")).applied == 1

    run(tmp_path, work)


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_descriptors_for_a_worker_is_a_typed_error(tmp_path: Path) -> None:
    async def work(_engine: Engine, _names: list[str]) -> None:
        fresh = pool.WorkerPool(1)
        with no_descriptors_left(), pytest.raises(ResourceExhausted, match="open files"):
            await fresh._start()

    run(tmp_path, work)
