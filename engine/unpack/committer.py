"""Seals and commits applied layers in chain order, as many as are ready at a time.

Async. What is ready while a batch is under way waits for the next one, so that one flush serves all
layers of a chain that are there by then. A batch that nobody waits for any more is cancelled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

import trio

from engine.errors import AlreadyExists, EngineError, NotFound, Unavailable
from engine.snapshots import Commit, Snapshotter
from engine.unpack.flusher import Flusher

__all__ = ["Committer", "Told", "has"]

Told = Callable[[int, int], None]
"""Told how many layers are committed together, and how many of them are."""


class _Ready:
    """A layer that is applied, whose parent is committed or was ready before it."""

    def __init__(self, step: Commit, told: Told, failures: int, *, flush: bool) -> None:
        self.step = step
        self.told = told
        self.failures = failures
        self.flush = flush
        self.done = trio.Event()
        self.error: EngineError | None = None
        self.batch: _Batch | None = None
        self.is_ours = True


class _Batch:
    """Layers that are committed together."""

    def __init__(self, layers: list[_Ready]) -> None:
        self.layers = layers
        self.waiting = len(layers)
        self.scope = trio.CancelScope()
        for layer in layers:
            layer.batch = self


class Committer:
    """Commits the layers of one backend."""

    def __init__(self, snapshotter: Snapshotter, flusher: Flusher) -> None:
        self._snapshotter = snapshotter
        self._flusher = flusher
        self._ready: list[_Ready] = []
        self._idle = trio.Event()
        self._idle.set()

    async def commit(self, step: Commit, told: Told, failures: int, *, flush: bool = True) -> bool:
        """Commit a layer, whose parent is committed or was given here before it.

        `failures` is how many flushes had failed before its first byte was written. Say whether it
        became this snapshot: another process may have been first with an equal one.
        """
        layer = _Ready(step, told, failures, flush=flush)
        self._ready.append(layer)
        if self._idle.is_set():
            self._idle = trio.Event()
            trio.lowlevel.spawn_system_task(self._run)
        try:
            await layer.done.wait()
        except trio.Cancelled:
            self._give_up(layer)
            raise
        if layer.error is not None:
            raise layer.error
        return layer.is_ours

    def _give_up(self, layer: _Ready) -> None:
        if layer.batch is None:
            self._ready.remove(layer)
            return
        layer.batch.waiting -= 1
        if not layer.batch.waiting:
            layer.batch.scope.cancel()

    async def _run(self) -> None:
        try:
            while self._ready:
                batch = _Batch(self._next_chain())
                with batch.scope:
                    await self._commit(batch.layers)
                for layer in batch.layers:
                    layer.done.set()
        finally:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is being committed: a thread may be at it when all callers have left."""
        await self._idle.wait()

    def _next_chain(self) -> list[_Ready]:
        """Take the first layer that waits, and those that stand on it."""
        chain = [self._ready.pop(0)]
        for layer in list(self._ready):
            if layer.step.parent == chain[-1].step.name:
                self._ready.remove(layer)
                chain.append(layer)
        return chain

    async def _commit(self, layers: Sequence[_Ready]) -> None:
        left = list(layers)
        for layer in layers:
            layer.told(len(layers), 0)
        try:
            while left:
                left = await self._commit_some(left)
        except Exception as error:  # noqa: BLE001  a bug must not leave anyone waiting
            failed = error if isinstance(error, EngineError) else EngineError(f"committing: {error!r}")
            for layer in left:
                layer.error = failed
        for layer in layers:
            layer.told(len(layers), len(layers))

    async def _commit_some(self, layers: list[_Ready]) -> list[_Ready]:
        """Commit what can be; return what is to be tried again."""
        steps = [layer.step for layer in layers]
        count, failed = await self._seal(steps, flush=any(layer.flush for layer in layers))
        flushed = takewhile(lambda layer: layer.failures == self._flusher.failures, layers[:count])
        if (whole := len(list(flushed))) < count:
            count, failed = whole, Unavailable("what was written could not be flushed; look at the disk")
        try:
            await trio.to_thread.run_sync(self._snapshotter.commit, *steps[:count])
        except EngineError as error:
            missing = await trio.to_thread.run_sync(self._without_committed, layers)
            if isinstance(error, AlreadyExists) and len(missing) < len(layers):
                return missing  # another process was first with some of them: theirs are as good as ours
            layers, count, failed = missing, 0, error
        for layer in layers[count:]:
            layer.error = failed
        return []

    async def _seal(self, steps: Sequence[Commit], *, flush: bool) -> tuple[int, EngineError | None]:
        """Seal `steps`; return how many may be committed, and why not all."""
        sealed = 0
        plan = partial(self._snapshotter.sealing, *steps, flush=flush)
        for sealing in await trio.to_thread.run_sync(plan):
            count, failed = await self._flusher.seal(sealing)
            sealed += count
            if failed is not None:
                return sealed, failed
        return len(steps), None

    def _without_committed(self, layers: Sequence[_Ready]) -> list[_Ready]:
        """Return `layers` without those that are committed, by whomever, and pin those."""
        left = []
        for layer in layers:
            if has(self._snapshotter, layer.step.lease, layer.step.name):
                layer.is_ours = False
            else:
                left.append(layer)
        return left


def has(snapshotter: Snapshotter, lease: str, name: str) -> bool:
    """Say whether a snapshot is there, and pin it in the same step."""
    try:
        snapshotter.stat(name, lease=lease)
    except NotFound:
        return False
    return True
