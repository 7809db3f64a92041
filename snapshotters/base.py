"""What all folder backends share: the contract over `MetaStore` and one folder per snapshot.

Sync; safe from any thread and process. A backend fills in hooks; folders are <backend>/<id>, and
what is inside is drawn in `snapshotters.sealing`.

Crash order: the record comes before the folder and is work in progress of a lease until the folder
is whole; a folder is renamed to trash and deleted only after its record went. So no folder is ever
without a record, and nobody has to guess which folders are dead.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from engine.errors import DataLoss, EngineError, FailedPrecondition, os_errors
from engine.failpoints import hit
from engine.fs.attributes import beneath, folder_descriptor
from engine.fs.durable import flush_file_system, flush_names
from engine.fs.removal import Unfinished
from engine.fs.usage import measure
from engine.kv.environment import Environment
from engine.kv.schema import Snapshot
from engine.labels import Labels
from engine.metadata.leases import end
from engine.metadata.lineage import Committing, MetaStore, info_of
from engine.mount import Mount
from engine.mounts.table import MountTable
from engine.snapshots import Capabilities, Commit, Info, Kind, Leftover, Sealing, Target, Usage
from snapshotters.comparing import Whereabouts
from snapshotters.discarding import discard, leftover
from snapshotters.folder_sink import OUTLINE, TREE
from snapshotters.new_folders import make_lasting, make_root
from snapshotters.planning import Planner
from snapshotters.sealing import Seal, Sealer, Settled, load_sealed

__all__ = ["BaseSnapshotter"]


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A step whose snapshot is sealed."""

    step: Commit
    record: Snapshot
    settled: Settled

    @property
    def shares(self) -> bool:
        """Whether it has the folder of another snapshot with the same layer, not its own."""
        return self.settled.folder not in {0, self.record.id}

    @property
    def committing(self) -> Committing:
        """What there is to record."""
        usage = Usage(self.settled.size, self.settled.inodes)
        # What shares a folder is noted as not flushed if that is.
        is_flushed = self.settled.is_flushed or self.shares
        return Committing(self.step, usage, is_flushed=is_flushed, shares=self.shares)


class BaseSnapshotter(ABC):
    """A snapshotter whose snapshots are folders; subclasses say how layers combine."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    settle: ClassVar[str]
    """The name of what settles applied layers (`snapshotters.sealing.Settle`)."""
    standing: ClassVar[str]
    """The name of what tells how a layer stands on others (`snapshotters.comparing.Standing`)."""

    def __init__(self, folder: Path, meta: Environment, namespace: str) -> None:
        """Use `folder`, made if need be, for the trees and `meta` for the records."""
        self._folder = folder
        self._meta = meta
        self._namespace = namespace
        self._store = MetaStore(meta, self.name, namespace)
        if not meta.readonly:
            with os_errors(f"snapshots of {self.name}"):
                make_lasting(folder)

    # -- hooks --------------------------------------------------------------------------------

    def _make(self, record: Snapshot, below: Sequence[Path]) -> None:  # noqa: B027  most need none
        """Fill the new folder of an active snapshot or a view; `below` is nearest first."""

    @abstractmethod
    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        """Return the mounts of an active snapshot or a view."""

    @property
    def _planner(self) -> Planner:
        return Planner(self._store, self._folder, self.name, self.capabilities, self.settle)

    # -- the contract -------------------------------------------------------------------------

    def prepare(
        self, key: str, parent: str = "", *, labels: Labels | None = None, lease: str = ""
    ) -> list[Mount]:
        """Make a writable snapshot and return its mounts."""
        return self._create(key, Kind.ACTIVE, parent, labels or {}, lease)

    def view(
        self, key: str, parent: str = "", *, labels: Labels | None = None, lease: str = ""
    ) -> list[Mount]:
        """Make a read-only snapshot and return its mounts."""
        return self._create(key, Kind.VIEW, parent, labels or {}, lease)

    def _create(self, key: str, kind: Kind, parent: str, labels: Labels, lease: str) -> list[Mount]:
        record, parents = self._store.create(key, kind, parent, labels, lease or None)
        below = [self._tree(above) for above in parents]
        self._make_new(record, below, lease)
        return self._mounts(record, below)

    def _make_new(self, record: Snapshot, below: Sequence[Path], lease: str) -> None:
        """Make the folder of a new record, durable if it is made under no lease but its own."""
        try:
            hit("snapshot.prepare.recorded")
            self._make_folder(record, below)
            hit("snapshot.prepare.made")
            if not lease:
                with os_errors(f"snapshot {record.key}"):
                    self._make_durable(record)
                self._store.release(record.key, record.lease)
        except BaseException:
            if not lease:
                end(self._meta, self._namespace, record.lease)
            raise

    def _make_folder(self, record: Snapshot, below: Sequence[Path]) -> None:
        try:
            with os_errors(f"snapshot {record.key}"):
                # By descriptor, not by umask: other threads have files of their own to make.
                self._place(record).mkdir(mode=0o700)
                make_root(self._tree(record))
                self._make(record, below)
        except BaseException:
            self._store.remove(record.key)
            self.cleanup(only={record.id})
            raise

    def reusable(self, diff_id: str) -> Usage | None:
        """Return what a layer takes up that is here to be reused, None if it is not."""
        found = self._standing(diff_id)
        return Usage(found.size, found.inodes) if found else None

    def _standing(self, diff_id: str) -> Snapshot | None:
        if not self._may_be_shared(diff_id):
            return None
        return self._store.standing(diff_id, self._serves)

    def _serves(self, number: int) -> bool:
        """Say whether what is known of a folder suffices for another snapshot to have its data."""
        place = self._folder / str(number)
        try:
            settled = load_sealed(place)
        except DataLoss:
            return False
        return settled is not None and bool(settled.marks) and (place / OUTLINE).exists()

    def reuse(
        self, key: str, diff_id: str, *, labels: Labels | None = None, lease: str = ""
    ) -> Usage | None:
        """Make an active snapshot that is to have the data of a layer that is here, on any base.

        From then on that stays whatever becomes of the snapshot it was found in: this one has it too.
        """
        standing = self._standing(diff_id)
        if standing is None:
            return None
        record = self._store.share(key, standing, labels or {}, lease or None)
        if record is None:
            return None
        self._make_new(record, (), lease)
        return Usage(standing.size, standing.inodes)

    def _make_durable(self, record: Snapshot) -> None:
        """Flush a new snapshot's own folders; what `_make` put in them is its to flush."""
        tree = self._tree(record)
        flush_names(tree, tree.parent, self._folder)

    def sink(self, key: str) -> Target:
        """Return where a layer's entries go, for an active snapshot."""
        record = self._store.get(key)
        if record.kind != Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key} is {record.kind}, not active")
        return Target(
            sink="snapshotters.folder_sink:open_sink",
            place=str(self._place(record)),
            name_bytes=self.capabilities.name_bytes,
            whiteout_names=self.capabilities.whiteout_names,
        )

    def comparing(self, key: str) -> Target:
        """Return where a layer's entries are held against a committed snapshot."""
        record = self._store.look(key)
        if record.kind != Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is {record.kind}, not committed")
        place = Whereabouts(
            folder=str(self._folder),
            number=record.id,
            below=[above.id for above in self._store.parents(key, in_doubt=True)],
            standing=self.standing,
        )
        return Target(
            sink="snapshotters.comparing:open_comparison",
            place=msgspec.json.encode(place).decode(),
            name_bytes=self.capabilities.name_bytes,
            whiteout_names=self.capabilities.whiteout_names,
        )

    def sealing(self, *steps: Commit, flush: bool = True) -> list[Sealing]:
        """Return what may be done elsewhere before `commit` is asked for the same steps."""
        return [_sealing(plan) for plan in self._planner.seals(steps, flush=flush)]

    def flushing(self) -> Sealing:
        """Return what may be done elsewhere, again and again, while snapshots are written."""
        return _sealing(Seal(settle=self.settle, folder=str(self._folder)))

    def flush(self) -> None:
        """Make durable what was committed without that; nothing to do is one look."""
        if notes := self._store.unflushed():
            with os_errors(f"snapshots of {self.name}"):
                flush_file_system(self._folder)
            hit("snapshot.flush.done")
            self._store.flushed(notes)

    def commit(self, *steps: Commit) -> None:
        """Commit actives, bottom first, each durable before it is visible; seal what is not sealed."""
        failure: EngineError | None = None
        sealer = Sealer()
        for sealing in self.sealing(*steps):
            _, failure = sealer(sealing.argument)
            if failure:
                break
        sealed: list[_Sealed] = []
        try:
            # One by one: what was sealed before an error counts.
            for one in self._sealed(steps):
                sealed.append(one)  # noqa: PERF402
        except EngineError as error:
            failure = failure or error
        flushed = max((one.settled.notes for one in sealed), default=0)
        self._store.commit(*(one.committing for one in sealed), flushed=flushed)
        hit("snapshot.commit.recorded")
        self._drop_needless(sealed)
        if failure:
            raise failure

    def _sealed(self, steps: Sequence[Commit]) -> Iterator["_Sealed"]:
        """Yield the steps that are sealed, up to the first that is not; raise what is wrong with one."""
        for step, record, _ in self._planner.checked(steps):
            settled = load_sealed(self._place(record))
            if settled is None:
                return
            if settled.parent != (step.parent or record.parent):
                raise FailedPrecondition(f"snapshot {step.key} is settled on another parent; remove it")
            yield _Sealed(step, record, settled)

    def _drop_needless(self, sealed: Sequence["_Sealed"]) -> None:
        """Delete what snapshots needed until they were committed, and nobody does from then on."""
        with os_errors(f"snapshots of {self.name}"):
            for one in sealed:
                if not (one.shares or self._may_be_shared(one.step.diff_id)):
                    (self._place(one.record) / OUTLINE).unlink(missing_ok=True)
            if own := {one.record.id for one in sealed if one.shares}:
                self.cleanup(only=own)

    def _may_be_shared(self, diff_id: str) -> bool:
        return bool(diff_id) and self.capabilities.shares

    def replace(self, step: Commit) -> list[Leftover]:
        """Put an active snapshot in the place of a committed one with the same layer."""
        old, record = self._store.look(step.name), self._store.get(step.key)
        below = self._store.parents(step.name, in_doubt=True)
        onto = Commit(name=step.name, key=step.key, parent=old.parent)
        _, failure = Sealer()(_sealing(self._planner.seal(onto, record, below)).argument)
        settled = load_sealed(self._place(record))
        if failure or settled is None:
            raise failure or FailedPrecondition(f"snapshot {step.key} could not be sealed")
        self._store.replace(old, record, Usage(settled.size, settled.inodes))
        hit("snapshot.replace.recorded")
        with os_errors(f"snapshots of {self.name}"):
            if not self._may_be_shared(old.diff_id):
                (self._place(record) / OUTLINE).unlink(missing_ok=True)
            return [] if self._store.has_folder(old) else self._retire(old)

    def _retire(self, old: Snapshot) -> list[Leftover]:
        """Delete the files of a snapshot that had children, some of which may be being mounted now."""
        folder = self._place(old)
        away = self._away(old.id)
        try:
            if MountTable.read().uses(folder):
                raise FailedPrecondition("it is mounted")
            with suppress(FileNotFoundError):
                folder.rename(away)
            # Whoever had its path already mounted it before this, or cannot any more.
            if MountTable.read().names(folder):
                away.rename(folder)
                raise FailedPrecondition("it is mounted")
        except (OSError, EngineError) as error:
            return [leftover(folder, away, error)]
        return self.cleanup(only={old.id})

    def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view."""
        record = self._store.get(key)
        if record.kind == Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is committed; make a view of it to mount it")
        return self._mounts(record, [self._tree(above) for above in self._store.parents(key)])

    def stat(self, key: str, *, lease: str = "") -> Info:
        """Return what is known of a snapshot; with a lease, pin it in the same step."""
        return info_of(self._store.get(key, lease=lease))

    def update(self, key: str, labels: Labels, paths: Sequence[str] | None = None) -> Info:
        """Set labels, deleting those whose new value is empty."""
        return info_of(self._store.update(key, labels, paths))

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes up: measured now for an active one, else as at commit."""
        record = self._store.get(key)
        if record.kind == Kind.COMMITTED:
            return Usage(record.size, record.inodes)
        tree = self._tree(record)
        with os_errors(f"snapshot {key}"), folder_descriptor(tree) as folder:
            return Usage(*measure(folder))

    def measure(self, key: str) -> Usage:
        """Return what is on disk of a snapshot now."""
        record = self._store.look(key)
        with os_errors(f"snapshot {key}"), folder_descriptor(self._folder) as top:
            try:
                with beneath(top, f"{record.id}/{TREE}".encode()) as tree:
                    return Usage(*measure(tree))
            except FileNotFoundError:
                raise DataLoss(f"there is no folder {self._tree(record)}") from None

    def walk(self) -> Iterator[Info]:
        """Yield all snapshots; others may write meanwhile."""
        return map(info_of, self._store.walk())

    def remove(self, key: str, *, table: MountTable | None = None) -> int:
        """Make a snapshot unreachable; `cleanup` deletes its files, known by the number returned."""
        record = self._store.look(key)
        is_used = (table or MountTable.read()).uses(self._folder / str(record.id))
        if is_used and not self._store.is_shared(record):
            raise FailedPrecondition(f"snapshot {key} is mounted; unmount it first")
        self._store.remove(key)
        return record.id

    def cleanup(
        self,
        *,
        only: Collection[int] | None = None,
        table: MountTable | None = None,
        seconds: float = math.inf,
    ) -> list[Leftover]:
        """Delete the files of all removed snapshots, or of some; return what is left for next time."""
        until = time.monotonic() + seconds
        trash = self._folder.parent.parent / "trash"
        gone, left = [], []
        for number in self._store.trash(only):
            table = table or MountTable.read()
            try:
                discard(self._folder / str(number), self._away(number), table, until)
            except Unfinished as error:
                left.append(leftover(self._folder / str(number), self._away(number), error))
                break
            except (OSError, EngineError) as error:  # mounted, immutable, written by a dying worker
                left.append(leftover(self._folder / str(number), self._away(number), error))
                continue
            gone.append(number)
        if gone:
            # Else a power loss could bring a folder back whose record nobody has any more.
            with os_errors(str(trash)):
                flush_names(self._folder, trash)
            self._store.forget(gone)
        return left

    def close(self) -> None:  # noqa: B027  nothing is held open between calls
        """Let go of what the backend holds; may be called again."""

    # -- folders ------------------------------------------------------------------------------

    def _away(self, number: int) -> Path:
        return self._folder.parent.parent / "trash" / f"{self.name}-{number}"

    def _place(self, record: Snapshot) -> Path:
        return self._folder / str(record.id)

    def _tree(self, record: Snapshot) -> Path:
        return self._place(record) / TREE


def _sealing(plan: Seal) -> Sealing:
    return Sealing(run="snapshotters.sealing:Sealer", argument=msgspec.msgpack.encode(plan))
