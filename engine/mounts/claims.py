"""What the records of mounts claim, held against the kernel's table, and what to do where they differ.

Sync; safe from any thread and process. What a crash left half done, and what vanished without us (plain
umount(8), another boot, a killed namespace), is cleared: a view's snapshot goes, a writable one is kept.
What is a container's is neither: its provisioner mounts it again, or removes it.
"""

import logging
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.errors import EngineError, FailedPrecondition, NotFound, Unavailable
from engine.metadata.mounts import MountRecord, MountState, MountStore, same_place
from engine.mount import deactivate
from engine.mounts.holders import held
from engine.mounts.table import MountID, MountTable, here, mount_id
from engine.processes import boot_id, pid_namespace
from engine.snapshots import Snapshotter

__all__ = ["Claims", "Released", "Seen", "anew", "discard", "id_of", "placed"]

_log = logging.getLogger(__name__)

Released = tuple[str, str]
"""Backend and key of a snapshot whose mount has vanished."""

Seen = tuple[list[MountRecord], MountTable]
"""All records of a namespace that can be read, and a table that is not older than they are.

Who then claims a record only if it is still as it was seen may go by the table.
"""


class Claims:
    """The records of one namespace, and what is so of them."""

    def __init__(
        self, records: MountStore, snapshots: Path, snapshotter: Callable[[str], Snapshotter]
    ) -> None:
        """`snapshots` is the folder that mounts of this store are made of."""
        self._records = records
        self._snapshots = snapshots
        self._snapshotter = snapshotter

    def read(self) -> Seen:
        """Return all records and the kernel's table."""
        # In this order: whatever a record says was so before the table was read.
        records = self._records.walk()
        return records, MountTable.read()

    def state(self, record: MountRecord, table: MountTable) -> MountState | None:
        """Return what state a mount is in by the kernel's table, None if it has vanished."""
        state = MountState(record.state)
        if state is MountState.KEPT:
            return state if self._records.has_snapshot(record) else None
        if record.boot != boot_id():
            return None
        if state is MountState.CHANGING:
            # What a crash left mounted in sight of others alone is theirs to undo.
            there = table.find_anywhere(id_of(record), record.device)
            is_theirs = there is not None and table.find(id_of(record), record.device) is None
            return state if is_theirs or self._records.is_held(record) else None
        if _is_shown(record, table):
            return MountState.MOUNTED
        return state if state is MountState.LAZY else None

    def stale(self) -> list[Released]:
        """Return the snapshots that `heal` would remove."""
        records, table = self.read()
        return [
            (record.backend, record.key)
            for record in records
            if not (record.rw or record.container) and self.state(record, table) is None
        ]

    def heal(self, seen: Seen | None = None) -> list[Released]:
        """Clear the records of mounts that vanished; return what snapshots went with them.

        Each record stands by itself: one that cannot be cleared waits for the next time.
        """
        records, table = seen or self.read()
        vanished = [r for r in records if not r.container and self.state(r, table) is None]
        busy: Collection[MountID] = ()
        try:
            busy = self.busy(vanished)
        except Unavailable as error:
            _log.warning("mounts that vanished in this boot stay recorded for now: %s", error)
            vanished = [record for record in vanished if record.boot != boot_id()]
        gone: list[Released] = []
        for record in vanished:
            with suppress(EngineError):
                left = self.clear(record, table, busy)
                if left.state == MountState.CHANGING and not record.rw:
                    gone.append((record.backend, record.key))
        return gone

    def busy(self, vanished: Collection[MountRecord]) -> Collection[MountID]:
        """Return those of mounts that no table shows which someone is in. Raises Unavailable."""
        return held([id_of(record) for record in vanished if record.boot == boot_id()])

    def clear(self, record: MountRecord, table: MountTable, busy: Collection[MountID]) -> MountRecord:
        """Undo what is left of a vanished mount; return its record, `changing` if it is gone.

        Somebody's `umount -l` leaves no trace in the table, but those who are in it (`busy`) are seen.
        """
        with self._records.claimed(placed(record, table), over=record) as mine:
            mount = self._left_mounted(mine, record, table)
            if mount is not None:
                try:
                    deactivate(Path(mine.target))
                except FailedPrecondition:  # someone is in it: then it is a mount like any other
                    return self.complete(mine, mount)
                table = MountTable.read()
            elif id_of(record) in busy:
                return self.become(mine, MountState.LAZY)
            return self.release(mine, record, table)

    def _left_mounted(self, mine: MountRecord, record: MountRecord, table: MountTable) -> MountID | None:
        """Return the mount at the target that a killed process made or was about to undo."""
        entry = table.on_top(Path(mine.target))
        is_ours_to_undo = record.boot == boot_id() and record.space == table.own.number
        if record.state != MountState.CHANGING or not is_ours_to_undo or entry is None:
            return None
        for other in self._records.everywhere():
            if other.state == MountState.MOUNTED and other.mount_id == entry.id:
                return None
            at_work = other.lease != mine.lease and self._records.is_held(other)
            if at_work and same_place(other, mine):
                return None
        return mount_id(Path(mine.target)) if table.is_made_of(entry, self._snapshots) else None

    def complete(self, record: MountRecord, mount: MountID) -> MountRecord:
        """Note that a claimed record is mounted, and what the kernel knows it by."""
        entry = MountTable.read_own().on_top(Path(record.target))
        done = msgspec.structs.replace(
            record,
            state=MountState.MOUNTED,
            mount_id=mount.id,
            unique_id=mount.unique,
            device=entry.device if entry else "",
            lease="",
        )
        self._records.swap(record, done)
        return done

    def release(self, mine: MountRecord, before: MountRecord, table: MountTable) -> MountRecord:
        """Settle a claimed record that is not mounted any more, and return what became of it.

        `before` is put back, for a later collection, where the snapshot cannot go now: another
        namespace has a copy of the mount, or the backend cannot be loaded.
        """
        if mine.rw and self._records.has_snapshot(mine):
            return self.become(mine, MountState.KEPT)
        try:
            discard(mine, self._snapshotter(mine.backend), table)
        except EngineError as error:
            _log.warning("what was mounted at %s keeps its snapshot for now: %s", mine.target, error)
            self._records.swap(mine, before)
            return before
        self._records.drop(mine)
        return mine

    def become(self, record: MountRecord, state: MountState) -> MountRecord:
        """Put a claimed record into a state that it stays in."""
        done = msgspec.structs.replace(record, state=state, lease="")
        self._records.swap(record, done)
        return done


def _is_shown(record: MountRecord, table: MountTable) -> bool:
    """Say whether a mount is in the table, or may be in a namespace that /proc does not show here."""
    if table.find_anywhere(id_of(record), record.device):
        return True
    would_show = table.sees_all or record.processes == pid_namespace()
    return not would_show and not table.is_shown(record.space)


def id_of(record: MountRecord) -> MountID:
    """Return what the kernel knows a recorded mount by."""
    return MountID(record.mount_id, record.unique_id)


def anew(record: MountRecord) -> MountRecord:
    """Return a record for this process to mount again what it tells of: the kernel has no such mount."""
    return msgspec.structs.replace(
        record,
        boot=boot_id(),
        space=here(),
        processes=pid_namespace(),
        mount_id=0,
        unique_id=0,
        device="",
    )


def placed(record: MountRecord, table: MountTable) -> MountRecord:
    """Return a record with the place where the table shows its mount now, if it does, as the target."""
    entry = table.find_anywhere(id_of(record), record.device) if record.boot == boot_id() else None
    if entry is None:
        return record
    # A record is UTF-8: of a place that others gave another name, that is shown escaped.
    place = os.fsencode(entry.point).decode(errors="backslashreplace")
    return msgspec.structs.replace(record, target=place)


def discard(record: MountRecord, backend: Snapshotter, table: MountTable | None = None) -> None:
    """Remove a record's snapshot and its files, if it is there."""
    with suppress(NotFound):
        number = backend.remove(record.key, table=table)
        for left in backend.cleanup(only={number}, table=table):
            _log.warning("files of snapshot %s stay in %s: %s", record.key, left.path, left.reason)
