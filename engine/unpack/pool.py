"""Long-lived worker processes, started when first needed.

Async. A job is a value, and so is its result; cancelling a job kills its worker, and a worker that
dies is an ordinary error of its job alone.
"""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from engine.diff.apply import Applied
from engine.errors import EngineError, by_name
from engine.unpack.jobs import HEADER, ApplyJob, Done, Failed, Progress, Reply, decode_reply, frame

__all__ = ["WorkerPool", "open_pool"]

_COMMAND = (sys.executable, "-P", "-m", "engine.unpack.worker")


class _Worker:
    """One process and the frames to and from it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def run(self, job: ApplyJob, progress: Callable[[int], None]) -> Applied:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(frame(job))
            while True:
                reply = await self._receive()
                if isinstance(reply, Progress):
                    progress(reply.read)
                elif isinstance(reply, Done):
                    return reply.applied
                elif isinstance(reply, Failed):
                    raise by_name(reply.kind, reply.message)
        except trio.BrokenResourceError:
            raise await self._death() from None

    async def _receive(self) -> Reply:
        length = int.from_bytes(await self._exactly(HEADER), "big")
        return decode_reply(await self._exactly(length))

    async def _exactly(self, count: int) -> bytes:
        assert self._process.stdout is not None
        while len(self._rest) < count:
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise await self._death()
            self._rest += piece
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    async def _death(self) -> EngineError:
        code = await self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return EngineError(f"a worker process {how} while unpacking; run the command again")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def stop(self) -> None:
        self._process.kill()
        with trio.CancelScope(shield=True):
            await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    await stream.aclose()


class WorkerPool:
    """Runs at most `size` jobs at once, each on a process of its own."""

    def __init__(self, size: int) -> None:
        self._slots = trio.CapacityLimiter(size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def run(self, job: ApplyJob, progress: Callable[[int], None]) -> Applied:
        """Run a job and return its result, or raise the error that it failed with."""
        async with self._slots:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                applied = await worker.run(job, progress)
            except EngineError:
                # It answered, or it is dead. Anything else may leave a reply under way, which the
                # next job would take for its own.
                await self._put_back(worker)
                raise
            except BaseException:
                await self._dismiss(worker)
                raise
            await self._put_back(worker)
            return applied

    async def _put_back(self, worker: _Worker) -> None:
        if worker.is_alive:
            self._idle.append(worker)
        else:
            await self._dismiss(worker)

    async def _dismiss(self, worker: _Worker) -> None:
        self._all.discard(worker)
        await worker.stop()

    async def _start(self) -> _Worker:
        process = await trio.lowlevel.open_process(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the engine, which then ends its workers
        )
        worker = _Worker(process)
        self._all.add(worker)
        return worker

    async def aclose(self) -> None:
        """End all workers."""
        with trio.CancelScope(shield=True):
            for worker in self._all:
                await worker.stop()


@asynccontextmanager
async def open_pool() -> AsyncIterator[WorkerPool]:
    """Give a pool with a worker for each processor that this process may use."""
    pool = WorkerPool(len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        await pool.aclose()
