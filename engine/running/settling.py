"""How containers are now: their records, held against what their monitors left, and whether those live.

Sync; safe from any thread and process. No record changes by itself when a process ends, as its monitor
writes none, and nobody may be there at that moment: whoever asks for a container first has it settled.

    running     its monitor left an end: `stopped`. Monitor and process are gone without one, as after a
                reboot: `stopped`, with an end that nobody could see
    starting    and who was at it is dead: `running` or `stopped` as above, if there was a process; else
                it stays, half made, for `recover` or a `launch` of the same ID to clear
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import FailedPrecondition, NotFound
from engine.kv.schema import now
from engine.metadata.containers import Container, ContainerState, ContainerStore, entered
from engine.provision.places import folder_of
from engine.root import Root
from engine.running import cgroups
from engine.running.outcome import Outcome, outcome
from engine.running.statuses import ContainerStatus

__all__ = ["SettledContainers", "told"]


class SettledContainers:
    """The containers of one namespace, each as it is now."""

    def __init__(self, root: Root, namespace: str) -> None:
        self.records = ContainerStore(root.meta, namespace)
        self._root = root

    def folder(self, container: Container) -> Path:
        """Return where all that there is of a container is."""
        return folder_of(self._root.path, container.unique)

    def look(self) -> list[Container]:
        """Return all containers as they are now, the oldest first; nothing is written."""
        found = ((one, self._after(one)) for one in self.records.walk())
        return [entered(one, **after) if after else one for one, after in found]

    def get(self, container: str) -> Container:
        """Return the record of a container by its ID, settled. NotFound."""
        return self.settle(self.records.get(container))

    def walk(self) -> list[Container]:
        """Return the records of all containers, settled, the oldest first."""
        settled = []
        for record in self.records.walk():
            with suppress(NotFound):  # it went meanwhile
                settled.append(self.settle(record))
        return settled

    def settle(self, record: Container) -> Container:
        """Return a record as it should be, written down if it was not. NotFound if it went meanwhile."""
        while after := self._after(record):
            try:
                return self.records.move(record, **after)
            except FailedPrecondition:  # somebody else was first
                record = self.records.get(record.id)
        return record

    def is_half_made(self, record: Container) -> bool:
        """Say whether a record is left of a launch that was killed before there was a process.

        One that a monitor is still at is not: what that starts will run.
        """
        return (
            record.state in {ContainerState.PREPARING, ContainerState.STARTING}
            and not self.records.is_held(record)
            and not outcome(self.folder(record)).monitored
        )

    def _after(self, record: Container) -> dict[str, Any]:
        """Return the state that a container is in, with what belongs to it; nothing if it says so."""
        if record.state == ContainerState.RUNNING:
            return self._ended(record, record.pid, outcome(self.folder(record)))
        if record.state != ContainerState.STARTING or self.records.is_held(record):
            return {}
        found = outcome(self.folder(record))
        pid = _pid_in(self.folder(record))
        if not found.ended and not pid:
            return {}
        running = {"state": ContainerState.RUNNING, "pid": pid, "lease": ""}
        return self._ended(record, pid, found) or running

    def _ended(self, record: Container, pid: int, found: Outcome) -> dict[str, Any]:
        if not found.ended and (found.monitored or _is_in(pid, record.unique)):
            # Without a monitor it runs on, but nobody will see its end.
            return {}
        return {
            "state": ContainerState.STOPPED,
            "exit_code": found.code if found.ended else None,
            "ended": found.at if found.ended else now(),
            "pid": 0,
            "lease": "",
        }


def _pid_in(folder: Path) -> int:
    """Return the process that the runtime has begun in a container's folder, 0 if none."""
    try:
        text = (folder / "pid").read_text(encoding="ascii")
    except FileNotFoundError:
        return 0
    return int(text) if text.isdecimal() else 0


def _is_in(pid: int, unique: str) -> bool:
    """Say whether a process is that of a container: another may have its number by now."""
    try:
        found = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return cgroups.name_of(unique) in found


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
