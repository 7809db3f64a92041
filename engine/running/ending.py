"""How what runs in a container ends: by itself, by a signal, or because the container is removed.

Async. Anyone may wait for an end, whoever launched the container: its monitor tells all that ask.
"""

import signal
from contextlib import suppress

import trio

from engine import limits
from engine.errors import FailedPrecondition, NotFound, Unavailable
from engine.failpoints import hit
from engine.kv.schema import now
from engine.metadata.containers import Container, ContainerState
from engine.running import cgroups
from engine.running.attaching import ended
from engine.running.settling import SettledContainers
from engine.running.statuses import Ended
from engine.running.tool import Tool

__all__ = ["Ending"]


class Ending:
    """Ends what runs in containers, and waits for it."""

    def __init__(self, settling: SettledContainers, tool: Tool) -> None:
        self._settling = settling
        self._tool = tool

    # -- by itself, or by a signal ------------------------------------------------------------

    async def wait(self, record: Container) -> Ended:
        """Wait until the process of a container has ended."""
        while record.state != ContainerState.STOPPED:
            found = await ended(self._settling.folder(record))
            if found.ended:
                return Ended(found.code, found.at)
            # Nobody watches it: not yet, or not any more.
            await trio.sleep(limits.CONTAINER_LOOK_S)
            later = await trio.to_thread.run_sync(self._later, record)
            if later is None:
                return Ended(None, now())
            record = later
        return Ended(record.exit_code, record.ended)

    def _later(self, record: Container) -> Container | None:
        """Return the record of a container as it is by now; None if it was removed."""
        with suppress(NotFound):
            found = self._settling.get(record.id)
            return found if found.unique == record.unique else None
        return None

    async def send(self, record: Container, number: int) -> None:
        """Send a signal to the first process of a container. FailedPrecondition if it does not run."""
        if not await trio.to_thread.run_sync(self._tool.kill, record.unique, number):
            raise FailedPrecondition(f"container {record.id} has just ended: it does not run")

    async def stop(self, record: Container, number: int, grace_s: float) -> Ended:
        """Ask a container to end, and kill it if it has not after some time. Raises Unavailable."""
        with suppress(FailedPrecondition):
            await self.send(record, number)
        with trio.move_on_after(grace_s):
            return await self.wait(record)
        with suppress(FailedPrecondition):
            await self.send(record, signal.SIGKILL)
        with trio.move_on_after(limits.MONITOR_ENDS_S):
            return await self.wait(record)
        raise Unavailable(
            f"container {record.id} does not end; stop it from the pid namespace that it was run from, "
            "or try again"
        )

    # -- for it to be removed -----------------------------------------------------------------

    async def end(self, record: Container) -> None:
        """See to it that nothing runs in a container, and that nothing of its runtime is left.

        Each step after the one before, each bounded in time. Unavailable for what does not end.
        """
        if ContainerState.STARTING not in record.since:
            return
        await trio.to_thread.run_sync(cgroups.kill_all, record.unique)
        hit("destroy.killed")
        with trio.move_on_after(limits.MONITOR_ENDS_S) as scope:
            await ended(self._settling.folder(record))
        if scope.cancelled_caught:
            raise Unavailable(f"the monitor of container {record.id} does not end; try again")
        await trio.to_thread.run_sync(self._tool.clear, record.unique)
        hit("destroy.deleted")
