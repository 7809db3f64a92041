"""What `mount` and `umount` do: a record, a snapshot, the kernel's mount, and the way back.

Sync; safe from any thread and process. Order: the record claims the target, the snapshot is made, the
kernel mounts it, the record is completed; and backwards. What a crash leaves in between is cleared by
the next `mount` and by a collection (`engine.mounts.claims`).
"""

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from engine.failpoints import hit
from engine.kv.schema import now
from engine.kv.table import Damaged
from engine.metadata.mounts import MountRecord, MountState, MountStore
from engine.mount import Mount, activate, deactivate, with_options, writes_to
from engine.mounts.claims import Claims, Seen, anew, discard, id_of, placed
from engine.mounts.holders import describe, holders
from engine.mounts.table import MountEntry, MountTable, here, is_mounted, mount_id
from engine.processes import boot_id, pid_namespace
from engine.root import Root
from engine.snapshots import Snapshotter

__all__ = ["Mounting", "Order"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_DEFAULTS = ("nosuid", "nodev")  # an image's devices and setuid files are not for those outside it


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
        self.claims = Claims(self._records, root.snapshots, snapshotter)

    # -- asking -------------------------------------------------------------------------------

    def walk(self) -> list[MountRecord]:
        """Return all records, each in the state and at the place that the kernel's table gives it.

        A vanished writable mount, or a container's, is `kept`; any other vanished view is left out, as
        it is about to be cleared.
        """
        records, table = self.claims.read()
        shown = []
        for record in records:
            state = self.claims.state(record, table)
            keeps = record.rw or bool(record.container)
            if state is None and keeps and self._records.has_snapshot(record):
                state = MountState.KEPT
            if state:
                where = placed(record, table) if state is MountState.MOUNTED else record
                shown.append(msgspec.structs.replace(where, state=state))
        return sorted(shown, key=lambda record: record.target)

    def damaged(self) -> list[Damaged]:
        """Return the names whose records cannot be read; their snapshots stay until removed by name."""
        return self._records.damaged()

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
        seen = self.claims.read()
        self.claims.heal(seen)
        _check_free(target)
        taken = self._records.get(name) if name else None
        if taken and taken.state != MountState.KEPT:
            place = placed(taken, seen[1]).target
            raise AlreadyExists(f"a mount named {name} is {taken.state} at {place}; choose another name")
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
            processes=pid_namespace(),
        )
        return self._mount(record, kept, order.backend, order.options)

    def mount_kept(self, record: MountRecord, target: Path, options: Sequence[str]) -> MountRecord:
        """Mount again what `kept` returned, whether or not its image still has a name."""
        target = self.ready(target)
        again = msgspec.structs.replace(anew(record), target=str(target))
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
                undo.callback(discard, mine, backend)
            hit("mount.prepared")
            undo.callback(_take_down, target)  # first: Ctrl-C may come as soon as the kernel is done
            activate(with_options(mounts, [*_DEFAULTS, *options]), target)
            hit("mount.activated")
            done = self.claims.complete(mine, mount_id(target))
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

    # -- unmounting ---------------------------------------------------------------------------

    def umount(self, target: Path, *, lazy: bool = False) -> MountRecord:
        """Undo `mount`; a writable snapshot stays, a read-only one goes. NotFound if there is none.

        `target` is where it is now: FailedPrecondition, with the place, if it was moved from there, and
        with who is in it for a busy one. A lazy one is taken out of sight at once;
        its snapshot stays until this boot ends, as nobody can tell who is still in it. A view whose
        snapshot cannot go now, as its backend cannot be loaded, is returned as `mounted`: it vanished.
        """
        places = (os.path.realpath(target), str(target.absolute()))
        # In this order: whatever a record says was so before the table was read.
        records, table = self._records.walk(), MountTable.read_own()
        record, state = self._named(places, records, table)
        self._check_free_of_container(record)
        if state is MountState.CHANGING:
            raise FailedPrecondition(f"{places[1]} is being mounted or unmounted; try again")
        if state is None:
            whole = MountTable.read()
            if self.claims.state(record, whole) is None:
                record = self.claims.clear(record, whole, self.claims.busy([record]))
                table = MountTable.read_own()
                if self.claims.state(record, table) is not MountState.MOUNTED:
                    return record
        entry = table.find(id_of(record), record.device)
        if entry is None:
            raise FailedPrecondition(
                f"{record.target} is mounted where another root sees it (chroot); unmount it from there"
            )
        if entry.point not in places:
            raise FailedPrecondition(
                f"what lamina mounted at {record.target} was moved to {entry.point}; "
                "unmount it by that name"
            )
        if entry != table.on_top(Path(entry.point)):
            raise FailedPrecondition(
                f"what is mounted at {entry.point} now is not lamina's; unmount that first"
            )
        return self._umount(record, entry, table, lazy=lazy)

    def _named(
        self, places: Collection[str], records: Sequence[MountRecord], table: MountTable
    ) -> tuple[MountRecord, MountState | None]:
        """Return the record of what is, or was, mounted at a target, and its state; NotFound."""
        on_top = {entry.id for place in places if (entry := table.on_top(Path(place)))}
        found = [
            (record, state)
            for record in records
            if record.space == here()
            and {record.target, placed(record, table).target}.intersection(places)
            and (state := self.claims.state(record, table))
            in {MountState.MOUNTED, MountState.CHANGING, None}
        ]
        if not found:
            self._check_elsewhere(places, records)
            raise NotFound(
                f"lamina has mounted nothing at {[*places][-1]}; `lamina mounts` lists what it has"
            )
        return min(found, key=lambda pair: (pair[1] is None, pair[0].mount_id not in on_top))

    def _check_elsewhere(self, places: Collection[str], records: Sequence[MountRecord]) -> None:
        """Raise FailedPrecondition if a target is mounted in sight of other processes alone."""
        others = [r for r in records if r.target in places and r.space != here()]
        table = MountTable.read() if others else None
        for record in others:
            if table and self.claims.state(record, table) is MountState.MOUNTED:
                raise FailedPrecondition(
                    f"{record.target} is mounted in another mount namespace; unmount it from there"
                )

    def _umount(
        self, record: MountRecord, entry: MountEntry, table: MountTable, *, lazy: bool
    ) -> MountRecord:
        target = Path(entry.point)
        with self._records.claimed(placed(record, table), over=record) as mine:
            if lazy:
                # Noted first: after a crash in between nobody may take it for unused.
                mine = self.claims.become(mine, MountState.LAZY)
            try:
                deactivate(target, lazy=lazy)
            except BaseException as error:
                self._records.swap(mine, record)
                if isinstance(error, FailedPrecondition):
                    raise FailedPrecondition(_busy(mine, table)) from None
                raise
            hit("umount.done")
            return mine if lazy else self.claims.release(mine, record, MountTable.read())

    # -- removing -----------------------------------------------------------------------------

    def seen_for_removing(self, keys: Collection[str]) -> Seen:
        """Return what `removing` goes by, after undoing what crashes left half done at `keys`."""
        seen = records, table = self.claims.read()
        died = [
            record
            for record in records
            if record.key in keys and record.state == MountState.CHANGING
            if self.claims.state(record, table) is None
        ]
        for record in died:
            self.claims.clear(record, table, self.claims.busy([record]))
        return self.claims.read() if died else seen

    @contextmanager
    def removing(self, backend: str, key: str, seen: Seen) -> Iterator[None]:
        """Remove a snapshot in the block, and with it the record of the mount that it is of, if any.

        FailedPrecondition while it is mounted or, out of sight, still in use by someone, and if its
        record is not as it was `seen` any more. Unavailable if it can't be told who is in it.
        """
        records, table = seen
        record = next((record for record in records if record.key == key), None)
        if record is None or record.backend != backend:
            with self._removing_unrecorded(key, record):
                yield
            return
        self._check_free_of_container(record)
        state = self.claims.state(record, table)
        if state in {MountState.MOUNTED, MountState.CHANGING}:
            raise FailedPrecondition(
                f"snapshot {key} is mounted; run `lamina umount {placed(record, table).target}` first"
            )
        if state is not MountState.KEPT and record.boot == boot_id():
            found = holders(id_of(record))
            if found:
                raise FailedPrecondition(f"snapshot {key} is still in use by {describe(found)}")
        with self._records.claimed(record, over=record) as mine:
            try:
                yield
            except BaseException:
                self._records.swap(mine, record)
                raise
            self._records.drop(mine)

    def check_removable(self, key: str) -> None:
        """Raise FailedPrecondition if the snapshot of a key is a container's."""
        record = self._records.get(key)
        if record is not None:
            self._check_free_of_container(record)

    def _check_free_of_container(self, record: MountRecord) -> None:
        if self._records.has_container(record):
            raise FailedPrecondition(
                f"{record.key} is a root file system of container {record.container}; "
                f"remove that with `lamina rm {record.container}`"
            )

    @contextmanager
    def _removing_unrecorded(self, key: str, seen: MountRecord | None) -> Iterator[None]:
        if key in {record.name for record in self.damaged()}:
            # Whether it is mounted the table tells; nothing can be mounted over the record meanwhile.
            yield
            self._records.forget(key)
            return
        if self._records.get(key) != seen:
            raise FailedPrecondition(f"mount {key} is being changed; try again")
        yield


def _check_free(target: Path) -> None:
    if is_mounted(target):
        raise FailedPrecondition(f"something is mounted at {target}; unmount it first")


def _take_down(target: Path) -> None:
    if is_mounted(target):
        deactivate(target, lazy=True)


def _busy(record: MountRecord, table: MountTable) -> str:
    below = table.below(record.mount_id)
    if below:
        return f"{record.target} has mounts on it: unmount {', '.join(sorted(below)[:5])} first"
    try:
        users = describe(holders(id_of(record)))
    except Unavailable as error:
        users = f"someone ({error})"
    return f"{record.target} is in use by {users}; end that first, or take it out of sight with --lazy"
