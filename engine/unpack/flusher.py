"""Has what layers write go to the disk while they are applied, so that a seal finds little to flush.

Async. A flush that fails tells the kernel's error once (syncfs(2)): whatever was being made then may be
what was lost. So failures are counted, for who began before one not to commit after it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from engine import failpoints, limits
from engine.errors import EngineError
from engine.snapshots import Sealing, Snapshotter
from engine.unpack.jobs import SealJob
from engine.unpack.pool import WorkerPool

__all__ = ["Flusher"]

_log = logging.getLogger(__name__)


class Flusher:
    """Flushes and seals on the worker of a pool that does."""

    def __init__(self, pool: WorkerPool) -> None:
        self.failures = 0
        self._pool = pool
        self._writers = 0
        self._written: set[Sealing] = set()
        self._scope = trio.CancelScope()
        self._idle = trio.Event()
        self._idle.set()

    @contextmanager
    def beside(
        self, snapshotter: Snapshotter, progress: Callable[[int], None]
    ) -> Iterator[Callable[[int], None]]:
        """Flush what is written in the block, now and then; give what is to be told of progress."""
        flushing = snapshotter.flushing()

        def told(read: int) -> None:
            self._written.add(flushing)
            progress(read)

        self._writers += 1
        if self._idle.is_set():
            self._idle, self._scope = trio.Event(), trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._run)
        try:
            yield told
        finally:
            self._writers -= 1

    async def _run(self) -> None:
        try:
            with self._scope:
                while self._writers:
                    await trio.sleep(limits.FLUSH_EVERY_S)
                    written, self._written = self._written, set()
                    for flushing in written if self._writers else ():  # else a seal does it
                        await self._flush(flushing)
        finally:
            self._idle.set()

    async def _flush(self, flushing: Sealing) -> None:
        try:
            await self.seal(flushing)
        except EngineError as error:  # ends what began before it, as its own error
            _log.debug("flushing beside the work: %s", error)

    async def seal(self, sealing: Sealing) -> tuple[int, EngineError | None]:
        """Seal layers; return how many are, and why not all. Raises if they cannot be flushed."""
        try:
            return await self._pool.seal(SealJob(sealing=sealing, failpoints=failpoints.terms()))
        except EngineError:
            # Counted before the next job of that worker begins: there is one at a time.
            self.failures += 1
            raise

    async def aclose(self) -> None:
        """Flush no more."""
        self._scope.cancel()
        await self._idle.wait()
