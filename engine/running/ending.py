"""How what runs in a container ends: by itself, by a signal, or because the container is removed.

Async. A monitor lets go of its lock when it ends, whoever started it: so anyone can wait for that.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from engine import limits
from engine.errors import FailedPrecondition, NotFound
from engine.failpoints import hit
from engine.kv.schema import now
from engine.metadata.containers import Container, ContainerState
from engine.running import cgroups, outcome
from engine.running.settling import RunOrder, Settling
from engine.running.statuses import Ended

__all__ = ["Ending"]

_SHORTLY_S = 0.05  # between two looks at what nobody tells


class _Vigil:
    """One who waits for an end."""

    ended: Ended | None = None


class Ending:
    """Ends what runs in containers, and waits for it."""

    def __init__(self, settling: Settling, runtime: Runtime) -> None:
        self._settling = settling
        self._runtime = runtime
        self._vigils: dict[str, list[_Vigil]] = {}

    # -- by itself, or by a signal ------------------------------------------------------------

    async def wait(self, record: Container) -> Ended:
        """Wait until the process of a container has ended."""
        with self._vigil(record.unique) as vigil:
            while vigil.ended is None and record.state != ContainerState.STOPPED:
                await self._something_happens(record)
                found = await trio.to_thread.run_sync(self._found, record)
                if found is None:  # removed, perhaps by another process, and what it left with it
                    return vigil.ended or Ended(None, now())
                record = found
        return vigil.ended or Ended(record.exit_code, record.ended)

    def _found(self, record: Container) -> Container | None:
        with suppress(NotFound):
            found = self._settling.get(record.id)
            return found if found.unique == record.unique else None
        return None

    @contextmanager
    def _vigil(self, unique: str) -> Iterator[_Vigil]:
        mine = _Vigil()
        vigils = self._vigils.setdefault(unique, [])
        vigils.append(mine)
        try:
            yield mine
        finally:
            vigils.remove(mine)
            if not vigils:
                self._vigils.pop(unique, None)

    async def _something_happens(self, record: Container) -> None:
        """Wait until the monitor of a container ends, or a moment if it has none."""
        watched = None
        if record.state in {ContainerState.RUNNING, ContainerState.DESTROYING}:
            watched = await trio.to_thread.run_sync(outcome.watch, self._settling.folder(record))
        if watched is None:
            await trio.sleep(limits.CONTAINER_LOOK_S)
            return
        try:
            await trio.lowlevel.wait_readable(watched)
        finally:
            os.close(watched)

    async def signal(self, record: Container, number: int) -> None:
        """Send a signal to the first process of a container."""
        await trio.to_thread.run_sync(self._runtime.kill, record.unique, number)

    async def stop(self, record: Container, number: int, grace_s: float) -> Ended:
        """Ask a container to end, and kill it if it has not after some time."""
        with suppress(FailedPrecondition):  # it ended just now
            await self.signal(record, number)
        with trio.move_on_after(grace_s):
            return await self.wait(record)
        with suppress(FailedPrecondition):
            await self.signal(record, signal.SIGKILL)
        return await self.wait(record)

    # -- for it to be removed -----------------------------------------------------------------

    async def end(self, record: Container) -> None:
        """See to it that nothing runs in a container, and that nothing of its runtime is left.

        Each step after the one before, and each bounded in time. Unavailable for what does not end.
        """
        await trio.to_thread.run_sync(self._runtime.kill_all, record.unique)
        hit("destroy.killed")
        await self._quiet(record)
        await trio.to_thread.run_sync(self._runtime.delete, record.unique)
        hit("destroy.deleted")
        await trio.to_thread.run_sync(self._tell, record)
        await trio.to_thread.run_sync(cgroups.remove, record.unique)
        hit("destroy.stopped")

    def _tell(self, record: Container) -> None:
        """Tell those who wait here how it ended, before that is removed."""
        end = outcome.read_exit(self._settling.folder(record))
        for vigil in self._vigils.get(record.unique, ()):
            vigil.ended = Ended(end.code, end.at) if end else Ended(None, now())
