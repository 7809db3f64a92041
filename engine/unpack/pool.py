"""Long-lived worker processes, started when first needed.

Async. A job is a value, and so is its result. A worker whose job is cancelled is told to stop, and
killed if it does not at once; one that dies is an ordinary error of its job alone. One that was dead
already when a job came is replaced.
"""

import subprocess
from collections.abc import Awaitable, Callable

import trio

from engine.diff.apply import Applied
from engine.errors import EngineError, Unavailable, os_errors
from engine.observing.metering import Layers, Meter, Moved
from engine.phases import Timings, total
from engine.unpack.jobs import (
    COMMAND,
    HEADER,
    ApplyJob,
    Arrived,
    Done,
    Failed,
    Job,
    Order,
    Progress,
    Reply,
    Sealed,
    SealJob,
    Started,
    Stop,
    Wants,
    decode_reply,
    frame,
)
from engine.unpack.slots import Slots

__all__ = ["More", "WorkerPool"]

More = Callable[[int], Awaitable[Arrived]]
"""Wait until more than so many bytes of a layer are there, and return how many are."""

_PATIENCE_S = 0.5  # with a stopped or killed worker: one within a system call ends when that does


def _unheard(_read: int) -> None:
    """Take note of nothing."""


async def _no_more(_seen: int) -> Arrived:
    raise AssertionError("a worker asks for more of what is whole")


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

    async def run(self, job: Job, progress: Callable[[int], None], more: More) -> Done | Sealed | Failed:
        has_started = False
        try:
            await self._send(job)
            while True:
                reply = await self._receive()
                if isinstance(reply, Started):
                    has_started = True
                elif isinstance(reply, Progress):
                    progress(reply.read)
                elif isinstance(reply, Wants):
                    await self._send(await more(reply.beyond))
                else:
                    return reply
        except (trio.BrokenResourceError, EOFError):
            error = await self._death()
            raise error if has_started else _NeverStarted(error) from None

    async def end_job(self) -> bool:
        """Have the worker stop the job that it is at; say whether it did."""
        with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE_S):
            try:
                await self._send(Stop())
                while isinstance(await self._receive(), Started | Progress | Wants):
                    pass
            except (trio.BrokenResourceError, EOFError):
                return False
            return True
        return False

    async def _send(self, order: Order) -> None:
        """Send all of a frame: half of one would be taken for the beginning of the next."""
        assert self._process.stdin is not None
        with trio.CancelScope(shield=True):
            await self._process.stdin.send_all(frame(order))
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _receive(self) -> Reply:
        """Return the next reply; nothing is lost if that is cancelled."""
        await self._have(HEADER)
        whole = HEADER + int.from_bytes(self._rest[:HEADER], "big")
        await self._have(whole)
        body, self._rest = self._rest[HEADER:whole], self._rest[whole:]
        return decode_reply(body)

    async def _have(self, count: int) -> None:
        assert self._process.stdout is not None
        while len(self._rest) < count:
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise EOFError
            self._rest += piece

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

    def __init__(self, size: int, meter: Meter | None = None) -> None:
        self.slots = Slots(size)
        self._meter = meter or Meter()
        self.sealing_took: Timings = {}
        self._sealing = trio.CapacityLimiter(1)  # all it does is system calls on one file system
        # By kind of job: what sealed a layer remembers what the next one stands on.
        self._idle: dict[type[Job], list[_Worker]] = {ApplyJob: [], SealJob: []}
        self._all: set[_Worker] = set()

    async def apply(
        self, job: ApplyJob, progress: Callable[[int], None], more: More = _no_more
    ) -> Applied:
        """Apply a layer, in a slot; return what came of it, or raise the error that it failed with.

        `more` is asked for what there is of a layer whose job does not say that all has arrived.
        """
        reply = await self._run(job, progress, more)
        assert isinstance(reply, Done)
        self._meter.had(Layers.APPLIED)
        self._meter.moved(Moved.UNPACKED, reply.applied.bytes_unpacked)
        self._meter.spent(reply.applied.timings)
        return reply.applied

    async def seal(self, job: SealJob) -> tuple[int, EngineError | None]:
        """Seal layers; return how many of them are, and why not all."""
        async with self._sealing:
            reply = await self._run(job, _unheard, _no_more)
        assert isinstance(reply, Sealed)
        self.sealing_took = total(self.sealing_took, reply.timings)
        self._meter.spent(reply.timings)
        return reply.count, reply.failed.error if reply.failed else None

    async def _run(self, job: Job, progress: Callable[[int], None], more: More) -> Done | Sealed:
        try:
            reply = await self._run_once(job, progress, more)
        except _NeverStarted:
            try:
                reply = await self._run_once(job, progress, more)
            except _NeverStarted as again:
                raise again.error from None
        if isinstance(reply, Failed):
            raise reply.error
        return reply

    async def _run_once(
        self, job: Job, progress: Callable[[int], None], more: More
    ) -> Done | Sealed | Failed:
        idle = self._idle[type(job)]
        worker = await self._take(idle)
        is_free = False
        try:
            reply = await worker.run(job, progress, more)
            is_free = True
            return reply
        except (trio.Cancelled, EngineError):  # the latter of `more`, or it is dead
            is_free = isinstance(job, ApplyJob) and await worker.end_job()
            raise
        finally:
            if is_free:
                idle.append(worker)
            else:
                await self._dismiss(worker)

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
                COMMAND,
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
