"""The worker process: applies and seals one layer after another until its standard input ends.

Sync. Started by exec, never forked from a process with LMDB open. A thread waits on the input all the
time: when the engine dies, however suddenly, the input ends and the worker with it, mid-layer or not.
"""

import gc
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from engine import failpoints
from engine.callables import named
from engine.content import extents
from engine.diff.apply import Applied, apply_layer
from engine.errors import EngineError
from engine.kv.environment import Environment
from engine.oci.digest import parse_digest
from engine.root import open_blobs
from engine.snapshots import Sealing
from engine.unpack.jobs import (
    HEADER,
    LARGEST,
    ApplyJob,
    Done,
    Failed,
    Job,
    Progress,
    Reply,
    Sealed,
    SealJob,
    Started,
    decode_job,
    frame,
)

__all__ = ["main"]

_REPORT_EVERY = 4 << 20  # bytes between two reports of progress


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


def _read_jobs(fd: int, jobs: "queue.Queue[Job]") -> None:
    while True:
        length = int.from_bytes(_read_exactly(fd, HEADER), "big")
        if length > LARGEST:
            os._exit(2)
        jobs.put(decode_job(_read_exactly(fd, length)))


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

    def run(self, job: Job) -> Reply:
        _send(self._out, Started())
        failpoints.arm(job.failpoints)
        try:
            return self._seal(job.sealing) if isinstance(job, SealJob) else Done(self._apply(job))
        except Exception as error:  # noqa: BLE001  a bug in one job must not end the others
            return Failed.of(error)

    def _seal(self, sealing: Sealing) -> Sealed:
        if sealing.run not in self._sealers:
            self._sealers[sealing.run] = named(sealing.run)()
        count, error = self._sealers[sealing.run](sealing.argument)
        return Sealed(count, Failed.of(error) if error else None)

    def _apply(self, job: ApplyJob) -> Applied:
        reported = 0

        def report(read: int) -> None:
            nonlocal reported
            if read - reported >= _REPORT_EVERY:
                reported = read
                _send(self._out, Progress(read))

        return apply_layer(
            self._pieces(job),
            job.target,
            diff_id=parse_digest(job.diff_id),
            progress=report,
        )

    def _pieces(self, job: ApplyJob) -> Iterable[bytes]:
        if job.data:
            return (job.data,)
        return extents.read(self._environment(job.root), job.number, job.size)

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
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.umask(0)
    _raise_file_limit()
    jobs: queue.Queue[Job] = queue.Queue()
    thread = threading.Thread(
        target=_read_jobs, args=(sys.stdin.fileno(), jobs), name="jobs", daemon=True
    )
    thread.start()
    worker = _Worker(out)
    # A layer's tree is many objects that live as long as the job: looking through them again and again
    # finds nothing, so garbage is looked for between jobs.
    gc.disable()
    while True:
        _send(out, worker.run(jobs.get()))
        gc.collect()


if __name__ == "__main__":
    main()
