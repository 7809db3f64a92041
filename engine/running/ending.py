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

    async def wait(self, record: Container) -> Ended:
        """Wait until the process of a container has ended."""
        with self._vigil(record.unique) as vigil:
            while vigil.ended is None and record.state != ContainerState.STOPPED:
                await self._something_happens(record)
                try:
                    found = await trio.to_thread.run_sync(self._settling.get, record.id)
                except NotFound:
                    found = None
                if found is None or found.unique != record.unique:
                    # Removed by another process, and what it left with it.
                    return vigil.ended or Ended(None, now())
                record = found
        return vigil.ended or Ended(record.exit_code, record.ended)

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

    def _tell(self, record: Container) -> None:
        """Tell those who wait here how it ended, before that is removed."""
        end = outcome.read_exit(self._settling.folder(record))
        for vigil in self._vigils.get(record.unique, ()):
            vigil.ended = Ended(end.code, end.at) if end else Ended(None, now())
