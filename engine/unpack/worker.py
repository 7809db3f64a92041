"""The worker process: applies and seals one layer after another until its standard input ends.

Sync. Started by exec, never forked from a process with LMDB open. A thread waits on the input all the
time: when the engine dies, however suddenly, the input ends and the worker with it, mid-layer or not.
So it hears of bytes of a layer that arrive while that is applied, and that nobody wants it any more.
"""

import gc
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec

from engine import failpoints
from engine.callables import named
from engine.content import extents
from engine.diff.apply import Applied, apply_layer
from engine.errors import EngineError
from engine.kv.environment import Environment
from engine.memory import keep_memory
from engine.oci.digest import parse_digest
from engine.phases import collecting
from engine.root import open_blobs
from engine.snapshots import Sealing
from engine.unpack.jobs import (
    HEADER,
    LARGEST,
    ApplyJob,
    Arrived,
    Done,
    Failed,
    Job,
    Progress,
    Reply,
    Sealed,
    SealJob,
    Started,
    Wants,
    decode_order,
    frame,
)

__all__ = ["main"]

_STDOUT, _STDERR = 1, 2
_REPORT_EVERY = 4 << 20  # bytes between two reports of progress


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


class _Supply:
    """The bytes of the layer that is being applied: how many are there; `ask` asks for more."""

    def __init__(self, ask: Callable[[int], None]) -> None:
        self._ask = ask
        self._news: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()
        self.is_stopped = False

    def tell(self, arrived: Arrived) -> None:
        self._news.put(arrived)

    def stop(self) -> None:
        self.is_stopped = True
        self._news.put(None)

    def more(self, seen: int) -> tuple[int, bool]:
        """Wait until there are more than `seen`; return how many, and whether those are all."""
        if seen:  # what there is to begin with came along
            self._ask(seen)
        arrived = self._news.get()
        if arrived is None:
            raise _Stopped
        return arrived.there, arrived.is_whole


class _Stopped(Exception):
    """Nobody wants the layer any more."""


def _read_orders(fd: int, jobs: "queue.Queue[tuple[Job, _Supply]]", ask: Callable[[int], None]) -> None:
    supply = _Supply(ask)
    while True:
        length = int.from_bytes(_read_exactly(fd, HEADER), "big")
        if length > LARGEST:
            os._exit(2)
        order = decode_order(_read_exactly(fd, length))
        if isinstance(order, Arrived):
            supply.tell(order)
        elif isinstance(order, Job):
            supply = _Supply(ask)  # what still comes for the job before is nobody's
            if isinstance(order, ApplyJob):
                supply.tell(order.arrived)
            jobs.put((order, supply))
        else:
            supply.stop()


def _send(fd: int, reply: Reply) -> None:
    data = frame(reply)
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        os._exit(0)  # the engine is gone, and so is whoever would read of it


class _Worker:
    def __init__(self, out: int) -> None:
        self._out = out
        self._blobs: tuple[str, Environment] | None = None
        self._open = ExitStack()
        self._sealers: dict[str, Callable[[bytes], tuple[int, EngineError | None]]] = {}

    def run(self, job: Job, supply: _Supply) -> Reply:
        _send(self._out, Started())
        failpoints.rearm(job.failpoints)
        try:
            with collecting() as timings:
                if isinstance(job, SealJob):
                    count, error = self._seal(job.sealing)
                    return Sealed(count, Failed.of(error) if error else None, timings)
                applied = self._apply(job, supply)
            return Done(msgspec.structs.replace(applied, timings=timings))
        except Exception as error:  # noqa: BLE001  a bug in one job must not end the others
            return Failed.of(error)

    def _seal(self, sealing: Sealing) -> tuple[int, EngineError | None]:
        if sealing.run not in self._sealers:
            self._sealers[sealing.run] = named(sealing.run)()
        return self._sealers[sealing.run](sealing.argument)

    def _apply(self, job: ApplyJob, supply: _Supply) -> Applied:
        reported = 0

        def report(read: int) -> None:
            nonlocal reported
            if read - reported >= _REPORT_EVERY:
                reported = read
                _send(self._out, Progress(read))

        return apply_layer(
            self._pieces(job, supply),
            job.target,
            diff_id=parse_digest(job.diff_id),
            progress=report,
        )

    def _pieces(self, job: ApplyJob, supply: _Supply) -> Iterator[bytes]:
        if job.data:
            yield job.data
            return

        for piece in extents.follow(self._environment(job.root), job.number, supply.more):
            if supply.is_stopped:
                raise _Stopped
            yield piece

    def _environment(self, root: str) -> Environment:
        if self._blobs is None or self._blobs[0] != root:
            self._blobs = None
            self._open.close()
            self._blobs = (root, self._open.enter_context(open_blobs(Path(root))))
        return self._blobs[1]


def _raise_file_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Serve jobs from standard input until it ends."""
    # Replies go to a descriptor of their own, so that nothing printed by accident corrupts them.
    if sys.stderr is None:
        os.open(os.devnull, os.O_WRONLY)  # the lowest number that is free
    out = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    os.umask(0)
    _raise_file_limit()
    jobs: queue.Queue[tuple[Job, _Supply]] = queue.Queue()
    work = (sys.stdin.fileno(), jobs, lambda seen: _send(out, Wants(seen)))
    thread = threading.Thread(target=_read_orders, args=work, name="orders", daemon=True)
    thread.start()
    worker = _Worker(out)
    # A layer's tree is many objects that live as long as the job: looking through them again and again
    # finds nothing, so garbage is looked for between jobs.
    gc.disable()
    keep_memory()
    while True:
        _send(out, worker.run(*jobs.get()))
        gc.collect()


if __name__ == "__main__":
    main()
