"""What `mount` and `umount` do: a record, a snapshot, the kernel's mount, and the way back.

Sync; safe from any thread and process. Order: the record claims the target, the snapshot is made, the
kernel mounts it, the record is completed; and backwards. What a crash leaves in between, and what
vanished without us (plain umount(8), another boot, a killed namespace), is cleared by the next `mount`
and by a collection (`heal`): a view's snapshot goes, a writable one is kept and listed.
"""

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.failpoints import hit
from engine.kv.schema import now
from engine.metadata.mounts import MountRecord, MountState, MountStore
from engine.mount import Mount, activate, deactivate, with_options, writes_to
from engine.mount_holders import describe, held, holders
from engine.mount_table import MountID, MountTable, boot_id, here, is_mounted, mount_id
from engine.root import Root
from engine.snapshots import Snapshotter

__all__ = ["Mounting", "Order", "Released"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_DEFAULTS = ("nosuid", "nodev")  # an image's devices and setuid files are not for those outside it

Released = tuple[str, str]
"""Backend and key of a snapshot whose mount has vanished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to mount where: `top` is the topmost layer of the image, unpacked in `backend`."""

    target: Path
    backend: Snapshotter
    image: str
    top: str
    rw: bool = False
    name: str | None = None
    options: Sequence[str] = field(default=())


class Mounting:
    """The mounts of one namespace on an open root."""

    def __init__(self, root: Root, namespace: str, snapshotter: Callable[[str], Snapshotter]) -> None:
        """`snapshotter` returns a backend by name."""
        self._root = root
        self._snapshotter = snapshotter
        self._records = MountStore(root.meta, namespace)

    # -- asking -------------------------------------------------------------------------------

    def walk(self) -> list[MountRecord]:
        """Return all records, each in the state that the kernel's table gives it.

        A vanished writable mount is `kept`; a vanished view is left out, as it is about to be cleared.
        """
        records, table = self._read()
        shown = []
        for record in records:
            state = self._state(record, table) or (MountState.KEPT if record.rw else None)
            if state:
                shown.append(msgspec.structs.replace(record, state=state))
        return shown

    def kept(self, name: str) -> MountRecord | None:
        """Return the writable mount of that name that is not mounted now."""
        record = self._records.get(name)
        return record if record and record.state == MountState.KEPT else None

    def kept_at(self, target: Path, image: str, backend: str | None) -> MountRecord | None:
        """Return what an earlier writable mount of an image at a target kept.

        InvalidArgument, with what to choose from, if several did.
        """
        found = [
            record
            for record in self._records.walk()
            if (record.target, record.image, record.state) == (str(target), image, MountState.KEPT)
            and backend in {None, record.backend}
        ]
        if len(found) < 2:
            return found[0] if found else None
        backends = sorted({record.backend for record in found})
        if len(backends) == len(found):
            raise InvalidArgument(
                f"writable mounts of this image at {target} are kept in {' and '.join(backends)}; "
                "say which with --snapshotter"
            )
        names = ", ".join(record.key for record in found)
        raise InvalidArgument(f"several are kept for {target}: mount one by its name ({names})")

    def ready(self, target: Path, name: str | None = None) -> Path:
        """Clear what vanished, and return the folder that `target` means if it is free to mount on.

        Raises what `mount` would for the target and the name: for asking before long work.
        """
        if name is not None and not _NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is not a name for a mount; use letters, digits and .-_")
        target = Path(os.path.realpath(target))
        if not target.is_dir():
            raise NotFound(f"{target} is not a folder; make it first")
        try:
            str(target).encode()
        except UnicodeEncodeError:
            raise InvalidArgument("the name of a mount point must be UTF-8") from None
        root = self._root.path
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise InvalidArgument(f"{target} and the store at {root} overlap; mount somewhere else")
        self.heal()
        _check_free(target)
        taken = self._records.get(name) if name else None
        if taken and taken.state != MountState.KEPT:
            raise AlreadyExists(
                f"a mount named {name} is {taken.state} at {taken.target}; choose another name"
            )
        return target

    # -- mounting -----------------------------------------------------------------------------

    def mount(self, order: Order) -> MountRecord:
        """Mount an unpacked image: read-only, or with a writable snapshot that `umount` keeps.

        What an earlier writable mount kept is used again. FailedPrecondition for a target in use,
        AlreadyExists for a name in use, or if what is kept stands on another image.
        """
        target = self.ready(order.target, order.name)
        kept = self._kept_for(order, target) if order.rw else None
        key = kept.key if kept else order.name or f"mount-{secrets.token_hex(4)}"
        record = MountRecord(
            key=key,
            target=str(target),
            backend=order.backend.name,
            rw=order.rw,
            image=order.image,
            top=order.top,
            state=MountState.CHANGING,
            created=kept.created if kept else now(),
            boot=boot_id(),
            space=here(),
            processes=_pid_namespace(),
        )
        return self._mount(record, kept, order.backend, order.options)

    def mount_kept(self, record: MountRecord, target: Path, options: Sequence[str]) -> MountRecord:
        """Mount again what `kept` returned, whether or not its image still has a name."""
        target = self.ready(target)
        again = msgspec.structs.replace(
            record, target=str(target), boot=boot_id(), space=here(), processes=_pid_namespace()
        )
        return self._mount(again, record, self._snapshotter(record.backend), options)

    def _kept_for(self, order: Order, target: Path) -> MountRecord | None:
        if order.name:
            kept = self.kept(order.name)
        else:
            kept = self.kept_at(target, order.image, order.backend.name)
        if kept is None or (kept.top, kept.backend) == (order.top, order.backend.name):
            return kept
        raise AlreadyExists(
            f"what is kept as {kept.key} stands on another image or backend; mount it with `lamina "
            f"mount {kept.key} {target}`, or remove it with `lamina snapshots rm {kept.key}`"
        )

    def _mount(
        self,
        record: MountRecord,
        kept: MountRecord | None,
        backend: Snapshotter,
        options: Sequence[str],
    ) -> MountRecord:
        target = Path(record.target)
        with (
            self._records.claimed(record, over=kept, takes_target=True) as mine,
            ExitStack() as undo,
        ):
            undo.callback(self._put_back, mine, kept)
            hit("mount.recorded")
            _check_free(target)
            mounts = self._snapshot(mine, kept, backend)
            if kept is None:
                undo.callback(_discard, mine, backend)
            hit("mount.prepared")
            activate(with_options(mounts, [*_DEFAULTS, *options]), target)
            undo.callback(deactivate, target, lazy=True)
            hit("mount.activated")
            done = self._complete(mine, mount_id(target))
            undo.pop_all()
        return done

    def _put_back(self, mine: MountRecord, before: MountRecord | None) -> None:
        if before:
            self._records.swap(mine, before)
        else:
            self._records.drop(mine)

    def _snapshot(
        self, record: MountRecord, kept: MountRecord | None, backend: Snapshotter
    ) -> Sequence[Mount]:
        if kept is None:
            make = backend.prepare if record.rw else backend.view
            return make(record.key, record.top)
        mounts = backend.mounts(record.key)
        written = writes_to(mounts)
        if written and MountTable.read().uses(written):
            # Two that write to one folder would ruin each other's files.
            raise FailedPrecondition(f"{record.key} is still mounted elsewhere; unmount it there first")
        return mounts

    def _complete(self, record: MountRecord, mount: MountID) -> MountRecord:
        entry = MountTable.read().on_top(Path(record.target))
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

    # -- unmounting ---------------------------------------------------------------------------

    def umount(self, target: Path, *, lazy: bool = False) -> MountRecord:
        """Undo `mount`; a writable snapshot stays, a read-only one goes. NotFound if there is none.

        FailedPrecondition, with who is in it, for a busy one. A lazy one is taken out of sight at once;
        its snapshot stays until this boot ends, as nobody can tell who is still in it.
        """
        target = target.absolute()
        records, table = self._read()
        places = {os.path.realpath(target), str(target)}
        states = {MountState.MOUNTED, MountState.CHANGING, None}
        at_target = [r for r in records if r.target in places and r.space == here()]
        found = [(r, state) for r in at_target if (state := self._state(r, table)) in states]
        if not found:
            raise NotFound(f"lamina has mounted nothing at {target}; `lamina mounts` lists what it has")
        record, state = next((pair for pair in found if pair[1]), found[0])
        if state is MountState.CHANGING:
            raise FailedPrecondition(f"{target} is being mounted or unmounted; try again")
        if state is None:
            record = self._clear(record, table, held([_id_of(record)]))
            table = MountTable.read()
            if self._state(record, table) is not MountState.MOUNTED:
                return record
        entry = table.on_top(Path(record.target))
        if entry is None or entry.id != record.mount_id:
            raise FailedPrecondition(
                f"what is mounted at {record.target} now is not lamina's; unmount that first"
            )
        return self._umount(record, table, lazy=lazy)

    def _umount(self, record: MountRecord, table: MountTable, *, lazy: bool) -> MountRecord:
        target = Path(record.target)
        with self._records.claimed(record, over=record) as mine:
            if lazy:
                # Noted first: after a crash in between nobody may take it for unused.
                mine = self._become(mine, MountState.LAZY)
            try:
                deactivate(target, lazy=lazy)
            except BaseException as error:
                self._records.swap(mine, record)
                if isinstance(error, FailedPrecondition):
                    raise FailedPrecondition(_busy(record, table)) from None
                raise
            hit("umount.done")
            return mine if lazy else self._release(mine, record, MountTable.read())

    def _release(self, mine: MountRecord, before: MountRecord, table: MountTable) -> MountRecord:
        """Settle a claimed record that is not mounted any more; `before` stays where that must wait."""
        if mine.rw and self._records.has_snapshot(mine):
            return self._become(mine, MountState.KEPT)
        try:
            _discard(mine, self._snapshotter(mine.backend), table)
        except FailedPrecondition:
            # Another namespace has a copy of the mount: a later collection tries again.
            self._records.swap(mine, before)
            return before
        self._records.drop(mine)
        return mine

    def _become(self, record: MountRecord, state: MountState) -> MountRecord:
        done = msgspec.structs.replace(record, state=state, lease="")
        self._records.swap(record, done)
        return done

    # -- removing -----------------------------------------------------------------------------

    @contextmanager
    def removing(self, backend: str, key: str, table: MountTable) -> Iterator[None]:
        """Remove a snapshot in the block, and with it the record of the mount that it is of, if any.

        FailedPrecondition while it is mounted or, out of sight, still in use by someone.
        """
        record = self._records.get(key)
        if record and record.state == MountState.CHANGING and self._state(record, table) is None:
            self._clear(record, table, ())
            record = self._records.get(key)
        if record is None or record.backend != backend:
            yield
            return
        state = self._state(record, table)
        if state in {MountState.MOUNTED, MountState.CHANGING}:
            raise FailedPrecondition(
                f"snapshot {key} is mounted; run `lamina umount {record.target}` first"
            )
        if state is not MountState.KEPT and record.boot == boot_id():
            found = holders(_id_of(record))
            if found:
                raise FailedPrecondition(f"snapshot {key} is still in use by {describe(found)}")
        with self._records.claimed(record, over=record) as mine:
            try:
                yield
            except BaseException:
                self._records.swap(mine, record)
                raise
            self._records.drop(mine)

    # -- clearing -----------------------------------------------------------------------------

    def stale(self) -> list[Released]:
        """Return the snapshots that `heal` would remove."""
        records, table = self._read()
        return [
            (record.backend, record.key)
            for record in records
            if not record.rw and self._state(record, table) is None
        ]

    def heal(self) -> list[Released]:
        """Clear the records of mounts that vanished; return what snapshots went with them.

        Each record stands by itself: one that cannot be cleared waits for the next time.
        """
        records, table = self._read()
        vanished = [record for record in records if self._state(record, table) is None]
        busy = held([_id_of(record) for record in vanished if record.boot == boot_id()])
        gone: list[Released] = []
        for record in vanished:
            with suppress(EngineError):
                left = self._clear(record, table, busy)
                if left.state == MountState.CHANGING and not record.rw:
                    gone.append((record.backend, record.key))
        return gone

    def _read(self) -> tuple[list[MountRecord], MountTable]:
        # In this order: whatever a record says was so before the table was read.
        records = self._records.walk()
        return records, MountTable.read()

    def _state(self, record: MountRecord, table: MountTable) -> MountState | None:
        """Return what state a mount is in by the kernel's table, None if it has vanished."""
        state = MountState(record.state)
        if state is MountState.KEPT:
            return state if self._records.has_snapshot(record) else None
        if record.boot != boot_id():
            return None
        if state is MountState.CHANGING:
            return state if self._records.is_held(record) else None
        if _is_shown(record, table):
            return MountState.MOUNTED
        return state if state is MountState.LAZY else None

    def _clear(self, record: MountRecord, table: MountTable, busy: Collection[MountID]) -> MountRecord:
        """Undo what is left of a vanished mount; return its record, `changing` if it is gone.

        Somebody's `umount -l` leaves no trace in the table, but those who are in it (`busy`) are seen.
        """
        with self._records.claimed(record, over=record) as mine:
            mount = self._left_mounted(record, table)
            if mount is not None:
                try:
                    deactivate(Path(record.target))
                except FailedPrecondition:  # someone is in it: then it is a mount like any other
                    return self._complete(mine, mount)
                table = MountTable.read()
            elif _id_of(record) in busy:
                return self._become(mine, MountState.LAZY)
            return self._release(mine, record, table)

    def _left_mounted(self, record: MountRecord, table: MountTable) -> MountID | None:
        """Return the mount at the target that a killed process made or was about to undo."""
        entry = table.on_top(Path(record.target))
        is_ours_to_undo = record.boot == boot_id() and record.space == table.own.number
        if record.state != MountState.CHANGING or not is_ours_to_undo or entry is None:
            return None
        others = {r.mount_id for r in self._records.walk() if r.state == MountState.MOUNTED}
        made = entry.id not in others and table.is_made_of(entry, self._root.snapshots)
        return mount_id(Path(record.target)) if made else None


def _is_shown(record: MountRecord, table: MountTable) -> bool:
    """Say whether a mount is in the table, or may be in a namespace that /proc does not show here."""
    if record.space == table.own.number:
        return table.has(_id_of(record), record.device, Path(record.target))
    if table.has_elsewhere(_id_of(record), record.device):
        return True
    would_show = table.sees_all or record.processes == _pid_namespace()
    return not would_show and not table.is_shown(record.space)


def _id_of(record: MountRecord) -> MountID:
    return MountID(record.mount_id, record.unique_id)


def _discard(record: MountRecord, backend: Snapshotter, table: MountTable | None = None) -> None:
    with suppress(NotFound):
        number = backend.remove(record.key, table=table)
        backend.cleanup(only={number}, table=table)


def _check_free(target: Path) -> None:
    if is_mounted(target):
        raise FailedPrecondition(f"something is mounted at {target}; unmount it first")


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _busy(record: MountRecord, table: MountTable) -> str:
    below = table.below(record.mount_id)
    if below:
        return f"{record.target} has mounts on it: unmount {', '.join(sorted(below)[:5])} first"
    found = holders(_id_of(record))
    return (
        f"{record.target} is in use by {describe(found)}; "
        "end that first, or take it out of sight with --lazy"
    )
