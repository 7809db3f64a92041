"""Long-lived worker processes, started when first needed.

Async. A job is a value, and so is its result; cancelling a job kills its worker, and a worker that
dies is an ordinary error of its job alone. One that was dead already when a job came is replaced.
"""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from engine.diff.apply import Applied
from engine.errors import EngineError, Unavailable, os_errors
from engine.unpack.jobs import (
    HEADER,
    ApplyJob,
    Done,
    Failed,
    Job,
    Progress,
    Reply,
    Sealed,
    SealJob,
    Started,
    decode_reply,
    frame,
)

__all__ = ["WorkerPool"]

_COMMAND = (sys.executable, "-P", "-m", "engine.unpack.worker")
_PATIENCE_S = 0.5  # with a killed worker: one within a system call ends when that does


def _unheard(_read: int) -> None:
    """Take note of nothing."""


class _NeverStarted(Exception):
    """The worker died before it took the job up: another may."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


class _Worker:
    """One process and the frames to and from it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def run(self, job: Job, progress: Callable[[int], None]) -> Done | Sealed | Failed:
        assert self._process.stdin is not None
        has_started = False
        try:
            await self._process.stdin.send_all(frame(job))
            while True:
                reply = await self._receive()
                if isinstance(reply, Started):
                    has_started = True
                elif isinstance(reply, Progress):
                    progress(reply.read)
                else:
                    return reply
        except (trio.BrokenResourceError, EOFError):
            error = await self._death()
            raise error if has_started else _NeverStarted(error) from None

    async def _receive(self) -> Reply:
        length = int.from_bytes(await self._exactly(HEADER), "big")
        return decode_reply(await self._exactly(length))

    async def _exactly(self, count: int) -> bytes:
        assert self._process.stdout is not None
        while len(self._rest) < count:
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise EOFError
            self._rest += piece
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    async def _death(self) -> EngineError:
        code = await self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return Unavailable(f"a worker process {how} while unpacking; run the command again")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def stop(self) -> None:
        self._process.kill()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_PATIENCE_S):
                await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    await stream.aclose()


class WorkerPool:
    """Applies at most `size` layers at once, each on a process of its own, and seals beside that."""

    def __init__(self, size: int) -> None:
        self._applying = trio.CapacityLimiter(size)
        self._sealing = trio.CapacityLimiter(1)  # all it does is system calls on one file system
        # By kind of job: what sealed a layer remembers what the next one stands on.
        self._idle: dict[type[Job], list[_Worker]] = {ApplyJob: [], SealJob: []}
        self._all: set[_Worker] = set()

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Wait for one of the places at which layers are applied, first come first served."""
        return self._applying

    async def apply(self, job: ApplyJob, progress: Callable[[int], None]) -> Applied:
        """Apply a layer, in a `slot`; return what came of it, or raise the error that it failed with."""
        reply = await self._run(job, progress)
        assert isinstance(reply, Done)
        return reply.applied

    async def seal(self, job: SealJob) -> tuple[int, EngineError | None]:
        """Seal layers; return how many of them are, and why not all."""
        async with self._sealing:
            reply = await self._run(job, _unheard)
        assert isinstance(reply, Sealed)
        return reply.count, reply.failed.error if reply.failed else None

    async def _run(self, job: Job, progress: Callable[[int], None]) -> Done | Sealed:
        try:
            reply = await self._run_once(job, progress)
        except _NeverStarted:
            try:
                reply = await self._run_once(job, progress)
            except _NeverStarted as again:
                raise again.error from None
        if isinstance(reply, Failed):
            raise reply.error
        return reply

    async def _run_once(self, job: Job, progress: Callable[[int], None]) -> Done | Sealed | Failed:
        idle = self._idle[type(job)]
        worker = await self._take(idle)
        try:
            reply = await worker.run(job, progress)
        except BaseException:
            # It is dead, or a reply is under way that the next job would take for its own.
            await self._dismiss(worker)
            raise
        idle.append(worker)
        return reply

    async def _take(self, idle: list[_Worker]) -> _Worker:
        while idle:
            worker = idle.pop()
            if worker.is_alive:
                return worker
            await self._dismiss(worker)
        return await self._start()

    async def _dismiss(self, worker: _Worker) -> None:
        self._all.discard(worker)
        await worker.stop()

    async def _start(self) -> _Worker:
        with os_errors("starting a worker process"):
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
            async with trio.open_nursery() as nursery:
                for worker in self._all:
                    nursery.start_soon(worker.stop)
