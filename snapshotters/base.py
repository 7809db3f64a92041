"""What all folder backends share: the contract over `MetaStore` and one folder per snapshot.

Sync; safe from any thread and process. A backend fills in three hooks; folders are

    <backend>/<id>/fs       the tree, or the layer of it
    <backend>/<id>/notes    what a layer asks of its parents, until it is committed
    <backend>/<id>/settling there while, or since, a layer was settled only in part

Crash order: the record comes before the folder and is work in progress of a lease until the folder
is whole; a folder is renamed to trash and deleted only after its record went. So no folder is ever
without a record, and nobody has to guess which folders are dead.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import ClassVar

from engine.diff import notes as layer_notes
from engine.diff.notes import Notes
from engine.errors import EngineError, FailedPrecondition, os_errors
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.fs.kernel import syncfs
from engine.fs.removal import remove_tree
from engine.fs.usage import measure
from engine.kv.environment import Environment
from engine.kv.schema import Snapshot
from engine.labels import Labels
from engine.metadata.leases import leased
from engine.metadata.lineage import MetaStore, info_of
from engine.mount import Mount, uses
from engine.snapshots import Capabilities, Commit, Info, Kind, Target, Usage

__all__ = ["BaseSnapshotter"]


class BaseSnapshotter(ABC):
    """A snapshotter whose snapshots are folders; subclasses say how layers combine."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, folder: Path, meta: Environment, namespace: str) -> None:
        """Use `folder`, made if need be, for the trees and `meta` for the records."""
        self._folder = folder
        self._meta = meta
        self._namespace = namespace
        self._store = MetaStore(meta, self.name, namespace)
        if not meta.readonly:
            with os_errors(f"snapshots of {self.name}"):
                folder.mkdir(exist_ok=True, mode=0o700)

    # -- hooks --------------------------------------------------------------------------------

    def _make(self, record: Snapshot, below: Sequence[Path]) -> None:  # noqa: B027  most need none
        """Fill the new folder of an active snapshot or a view; `below` is nearest first."""

    @abstractmethod
    def _mounts(self, record: Snapshot, below: Sequence[Path]) -> list[Mount]:
        """Return the mounts of an active snapshot or a view."""

    @abstractmethod
    def _settle(self, layer: int, notes: Notes, below: Sequence[Path]) -> Usage:
        """Make the applied layer right on top of `below`; called again only after it succeeded."""

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
        # Work in progress needs a lease, so that a crash before the end leaves no root behind.
        own: AbstractContextManager[str] = (
            nullcontext(lease) if lease else leased(self._meta, self._namespace)
        )
        with own as pin:
            record, parents = self._store.create(key, kind, parent, labels, pin)
            hit("snapshot.prepare.recorded")
            below = [self._tree(above) for above in parents]
            try:
                with os_errors(f"snapshot {key}"):
                    # By descriptor, not by umask: other threads have files of their own to make.
                    folder = self._folder / str(record.id)
                    folder.mkdir(mode=0o700)
                    _make_root(folder / "fs")
                    self._make(record, below)
            except BaseException:
                self._store.remove(key)
                self.cleanup()
                raise
            hit("snapshot.prepare.made")
            if not lease:
                with os_errors(f"snapshot {key}"):
                    self._make_durable(record)
                self._store.release(key)
            return self._mounts(record, below)

    def _make_durable(self, record: Snapshot) -> None:
        """Flush a new snapshot's own folders; what `_make` put in them is its to flush."""
        tree = self._tree(record)
        for folder in (tree, tree.parent, self._folder):
            with folder_descriptor(folder) as opened:
                os.fsync(opened)

    def sink(self, key: str) -> Target:
        """Return where a layer's entries go, for an active snapshot."""
        record = self._store.get(key)
        if record.kind != Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key} is {record.kind}, not active")
        return Target(
            folder=str(self._tree(record)),
            notes=str(self._notes(record)),
            name_bytes=self.capabilities.name_bytes,
            whiteout_names=self.capabilities.whiteout_names,
        )

    def commit(self, *steps: Commit, lease: str = "") -> None:
        """Commit actives, bottom first, each durable before it is visible, with one flush for all."""
        settled: list[tuple[Commit, Snapshot, Usage]] = []
        above: list[Snapshot] = []  # the chain of the step before, nearest first
        failure: EngineError | None = None
        for step in steps:
            try:
                record, below = self._foundations(step, settled, above)
                usage = self._settle_one(record, below)
            except EngineError as error:
                failure = error
                break
            settled.append((step, record, usage))
            above = [record, *below]
        hit("snapshot.commit.settled")
        if settled:
            self._flush()
        hit("snapshot.commit.flushed")
        for step, record, usage in settled:
            self._store.commit(
                step.name, step.key, step.parent, usage=usage, labels=step.labels, lease=lease
            )
            hit("snapshot.commit.recorded")
            with os_errors(f"snapshot {step.name}"):
                self._notes(record).unlink(missing_ok=True)
        if failure:
            raise failure

    def _foundations(
        self, step: Commit, settled: Sequence[tuple[Commit, Snapshot, Usage]], above: list[Snapshot]
    ) -> tuple[Snapshot, list[Snapshot]]:
        if settled and step.parent == settled[-1][0].name:
            # The parent is settled but not recorded yet: the store cannot know it.
            record, _ = self._store.check_commit(step.name, step.key, None)
            return record, above
        record, parent = self._store.check_commit(step.name, step.key, step.parent)
        if not parent:
            return record, []
        return record, [self._store.get(parent), *self._store.parents(parent)]

    def _settle_one(self, record: Snapshot, below: Sequence[Snapshot]) -> Usage:
        if len(below) >= self.capabilities.layers:
            raise FailedPrecondition(
                f"{self.name} stacks at most {self.capabilities.layers} layers; "
                "use another snapshotter for this image"
            )
        tree = self._tree(record)
        with os_errors(f"snapshot {record.key}"), folder_descriptor(tree) as layer:
            notes = layer_notes.load(self._notes(record))
            if notes is None:
                if record.parent or not below:
                    return Usage(*measure(layer))
                # Written to through a mount, and rebased now: it hides nothing of its parents.
                size, inodes = measure(layer)
                notes = Notes(whiteouts=[], opaque=[], implied=[], size=size, inodes=inodes)
            broken = self._tree(record).with_name("settling")
            if broken.exists():
                raise FailedPrecondition(f"a commit of snapshot {record.key} failed halfway; remove it")
            broken.touch()
            usage = self._settle(layer, notes, [self._tree(lower) for lower in below])
            broken.unlink()
            return usage

    def _flush(self) -> None:
        with os_errors(f"snapshots of {self.name}"), folder_descriptor(self._folder) as folder:
            syncfs(folder)

    def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view."""
        record = self._store.get(key)
        if record.kind == Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is committed; make a view of it to mount it")
        return self._mounts(record, [self._tree(above) for above in self._store.parents(key)])

    def stat(self, key: str, *, lease: str = "") -> Info:
        """Return what is known of a snapshot; with a lease, pin it in the same step."""
        return info_of(self._store.get(key, lease=lease))

    def update(self, key: str, labels: Labels) -> Info:
        """Set labels, deleting those whose new value is empty."""
        return info_of(self._store.update(key, labels))

    def usage(self, key: str) -> Usage:
        """Return what a snapshot takes up: measured now for an active one, else as at commit."""
        record = self._store.get(key)
        if record.kind == Kind.COMMITTED:
            return Usage(record.size, record.inodes)
        tree = self._tree(record)
        with os_errors(f"snapshot {key}"), folder_descriptor(tree) as folder:
            return Usage(*measure(folder))

    def walk(self) -> list[Info]:
        """Return all snapshots."""
        return [info_of(record) for record in self._store.walk()]

    def remove(self, key: str) -> None:
        """Make a snapshot unreachable; `cleanup` deletes its files."""
        record = self._store.get(key)
        if uses(self._folder / str(record.id)):
            raise FailedPrecondition(f"snapshot {key} is mounted; unmount it first")
        self._store.remove(key)

    def cleanup(self) -> None:
        """Delete the files of removed snapshots; one that resists is left for the next time."""
        trash = self._folder.parent.parent / "trash"
        for number in self._store.trash():
            try:
                self._discard(number, trash)
            except (OSError, EngineError):
                continue  # mounted, or still being written by a dying worker
            self._store.forget(number)

    def _discard(self, number: int, trash: Path) -> None:
        folder = self._folder / str(number)
        if uses(folder):
            raise FailedPrecondition(f"{folder} is mounted")
        away = trash / f"{self.name}-{number}"
        if not away.exists():
            with suppress(FileNotFoundError):  # another process moves it, or deleted it already
                folder.rename(away)
        hit("trash.moved")
        with folder_descriptor(trash) as parent:
            remove_tree(parent, os.fsencode(away.name))

    def close(self) -> None:  # noqa: B027  nothing is held open between calls
        """Let go of what the backend holds; may be called again."""

    # -- folders ------------------------------------------------------------------------------

    def _tree(self, record: Snapshot) -> Path:
        return self._folder / str(record.id) / "fs"

    def _notes(self, record: Snapshot) -> Path:
        return self._folder / str(record.id) / "notes"


def _make_root(tree: Path) -> None:
    """Make the root of a tree: 0755 0:0 whatever it would inherit from a setgid bit or an ACL."""
    tree.mkdir(mode=0o755)
    os.chown(tree, 0, 0)
    for key in ("system.posix_acl_access", "system.posix_acl_default"):
        with suppress(OSError):  # there is none, as nearly always
            os.removexattr(tree, key)
    tree.chmod(0o755)
