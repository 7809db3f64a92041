"""How containers are now: their records, held against what their monitors have left, and whether those live.

Sync; safe from any thread and process. No record changes by itself when a process ends, as its monitor
writes none, and nobody may be there at that moment: whoever asks for a container first has it settled.

    running     its monitor left an end: `stopped`. Monitor and processes are gone without one, as after a
                reboot: `stopped`, with an end that nobody could see
    starting    and who was at it is dead: `running` or `stopped` as above, if it got as far as a process;
                else it stays, half made, for `recover` or a `launch` of the same ID to clear
"""

from pathlib import Path
from typing import Any

from engine.errors import FailedPrecondition
from engine.kv.schema import now
from engine.metadata.containers import Container, ContainerState
from engine.provision.places import folder_of
from engine.running import cgroups, outcome
from engine.running.statuses import ContainerStatus
from engine.stores import Stores

__all__ = ["Settling", "told"]


class Settling:
    """The containers of one namespace, each as it is now."""

    def __init__(self, stores: Stores) -> None:
        self._root = stores.root
        self.records = stores.containers

    def folder(self, container: Container) -> Path:
        """Return where all that there is of a container is."""
        return folder_of(self._root.path, container.unique)

    def get(self, container: str) -> Container:
        """Return the record of a container by its ID, settled. NotFound."""
        return self.settle(self.records.get(container))

    def walk(self) -> list[Container]:
        """Return the records of all containers, settled, the oldest first."""
        return [self.settle(record) for record in self.records.walk()]

    def settle(self, record: Container) -> Container:
        """Return a record as it should be, and write it if it was not; as it was if it is gone."""
        while after := self._after(record):
            try:
                return self.records.move(record, **after)
            except FailedPrecondition:  # somebody else was first
                record = self.records.get(record.id)
        return record

    def _after(self, record: Container) -> dict[str, Any] | None:
        """Return the state that a container is in, with what belongs to it; None if it is as it says."""
        if record.state == ContainerState.RUNNING:
            return self._ended(record)
        if record.state != ContainerState.STARTING or self.records.is_held(record):
            return None
        pid = outcome.read_pid(self.folder(record))
        if pid is None:
            return None
        return self._ended(record) or {"state": ContainerState.RUNNING, "pid": pid, "lease": ""}

    def _ended(self, record: Container) -> dict[str, Any] | None:
        folder = self.folder(record)
        end = outcome.read_exit(folder)
        if end is None and outcome.is_watched(folder):
            return None
        end = end or outcome.read_exit(folder)  # it may have come between the two
        if end is None and cgroups.processes(record.unique):
            return None  # its monitor was killed: it runs on, but nobody will see its end
        return {
            "state": ContainerState.STOPPED,
            "exit_code": end.code if end else None,
            "ended": end.at if end else now(),
            "pid": 0,
            "lease": "",
        }


def told(record: Container) -> ContainerStatus:
    """Return what is told of a container."""
    return ContainerStatus(
        id=record.id,
        unique=record.unique,
        state=ContainerState(record.state),
        since=record.since,
        created=record.created,
        image=record.image,
        target=record.target,
        backend=record.backend,
        command=record.command,
        parent=record.parent,
        labels=record.labels,
        pid=record.pid,
        exit_code=record.exit_code,
        ended=record.ended,
        errors=record.errors,
        error=record.error,
    )
