"""Workers that are no processes: jobs are done on a thread of the test, where it can look on.

Sync.
"""

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from engine.beside import beside
from engine.errors import EngineError
from engine.root import Root
from engine.unpack.jobs import ApplyJob, Job, Reply
from engine.unpack.pool import More, WorkerPool
from engine.unpack.worker import _Supply, _Worker

__all__ = ["workers_inline"]

Gate = Callable[[], Awaitable[None]]


@contextmanager
def workers_inline(monkeypatch: pytest.MonkeyPatch, root: Root) -> Iterator[list[Gate]]:
    """Do all jobs on this process's threads, whose umask must be 0; each after all gates let it.

    Gives the gates, of which there are none at first.
    """
    gates: list[Gate] = []
    nowhere = os.open(os.devnull, os.O_WRONLY)
    working = _Worker(nowhere)
    monkeypatch.setattr(working, "_environment", lambda _root: root.blobs)

    real = WorkerPool._run_once

    async def at_home(_pool: object, job: Job, _progress: object, more: More) -> Reply:
        for gate in gates:
            await gate()

        token = trio.lowlevel.current_trio_token()
        orders, asked = trio.open_memory_channel[int](1)
        failed: list[EngineError] = []

        def ask(seen: int) -> None:
            trio.from_thread.run_sync(orders.send_nowait, seen, trio_token=token)

        async def answer() -> None:
            try:
                async for seen in asked:
                    supply.tell(await more(seen))
            except EngineError as error:
                failed.append(error)
            finally:
                supply.stop()  # as a worker is told to where the caller leaves

        supply = _Supply(ask)
        if isinstance(job, ApplyJob):
            supply.tell(job.arrived)
        async with beside() as nursery:
            nursery.start_soon(answer)
            reply = await trio.to_thread.run_sync(working.run, job, supply)
        if failed:
            raise failed[0]
        return reply

    monkeypatch.setattr(WorkerPool, "_run_once", at_home)
    try:
        yield gates
    finally:
        monkeypatch.setattr(WorkerPool, "_run_once", real)
        os.close(nowhere)
