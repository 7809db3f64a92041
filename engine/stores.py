"""Everything that a root holds, opened together: the sync half of the engine.

Sync; safe from any thread. The command line uses it without an event loop, `engine.app` on threads.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from engine import plugins
from engine.content.image import ResolvedImage, resolve
from engine.content.keeping import is_kept
from engine.content.present import present
from engine.content.store import ContentStore
from engine.doubts import flush_waiting
from engine.errors import EngineError, FailedPrecondition, InvalidArgument, NotFound, Refused, os_errors
from engine.fs.removal import UNFINISHED
from engine.fsck.checking import Scope, check
from engine.fsck.findings import Checked, Finding
from engine.fsck.reapplying import Apply
from engine.gc.activity import Seen, glance
from engine.gc.collect import Collected, collect
from engine.gc.holding import give_up, remove_blob
from engine.gc.policy import Disk, Enforced, Policy, asks, enforce
from engine.gc.survey import Places
from engine.identifiers import check_identifier
from engine.kv.schema import Image, MountRecord
from engine.kv.space import give_back
from engine.metadata.containers import ContainerStore
from engine.metadata.images import ImageStore
from engine.metadata.leases import LeaseStore
from engine.metadata.lineage import full_key
from engine.metadata.namespaces import NamespaceStore
from engine.metadata.nodes import snapshot_node
from engine.metadata.provisions import ProvisionStore
from engine.metadata.pulls import PullStore
from engine.metadata.references import ReferenceStore
from engine.mounts.mounting import Mounting
from engine.mounts.table import MountTable
from engine.observing.metering import Verb
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform, normalise
from engine.oci.short import the_one
from engine.progress import Report, Step, silent
from engine.recovery import recover
from engine.root import Root, open_root
from engine.snapshots import Kind, Leftover, Snapshotter

__all__ = ["Removal", "Stores", "host_platform", "open_stores"]

_log = logging.getLogger(__name__)

_CLEAR_S = 0.5  # of deleting folders, at first, between two calls of `report`
_CLEAR_MOST_S = 8.0  # later: one of 2,000,000 names is listed in less
_SPARE = 16 << 20  # free bytes that meta.lmdb keeps, so that forgetting needs no disk to spare


def host_platform() -> Platform:
    """Return the platform of this machine."""
    host = os.uname()
    return normalise(Platform(os=host.sysname.lower(), architecture=host.machine))


@dataclass(frozen=True, slots=True)
class Removal:
    """What came of removing snapshots: so many of them are gone; `failed` is why not all are."""

    count: int
    left: Sequence[Leftover]
    failed: EngineError | None


class Stores:
    """The stores of one namespace on an open root."""

    def __init__(self, root: Root, namespace: str, platform: Platform) -> None:
        check_identifier(namespace, "namespace")
        self.root = root
        self.namespace = namespace
        self.platform = platform
        self.content = ContentStore(root.meta, root.blobs, namespace)
        self.images = ImageStore(root.meta, namespace)
        self.leases = LeaseStore(root.meta, namespace)
        self.pulls = PullStore(root.meta, namespace, self.images)
        self.references = ReferenceStore(root.meta, namespace)
        self.containers = ContainerStore(root.meta, namespace)
        self.provisions = ProvisionStore(root.meta, namespace, self.containers, self.references)
        self.namespaces = NamespaceStore(root.meta)
        self.mounting = Mounting(root, namespace, self.snapshotter)
        self._snapshotters: dict[str, Snapshotter] = {}
        self._default: str | None = None
        self._tried: set[str] = set()

    def snapshotter(self, name: str | None = None) -> Snapshotter:
        """Return a backend by name, or the best that works here. InvalidArgument, NotSupported."""
        if name is None:
            # Found out by mounting, so once is enough.
            self._default = self._default or plugins.default_name(self.root)
            name = self._default
            self._tried.add(name)
        if name not in self._snapshotters:
            self._snapshotters[name] = plugins.create(self.root, name, self.namespace)
        return self._snapshotters[name]

    def working(self, name: str) -> Snapshotter:
        """Return a backend by name, once it was tried here. InvalidArgument, NotSupported."""
        if name not in self._tried:
            plugins.check(self.root, name)
            self._tried.add(name)
        return self.snapshotter(name)

    def find_snapshot(self, text: str, backend: str | None = None) -> tuple[Snapshotter, str]:
        """Return the snapshot whose key is `text`, or whose chain ID begins so, and what has it.

        NotFound, InvalidArgument if there are several.
        """
        places = [self.snapshotter(backend)] if backend else self.snapshotters()
        found = [(place, text) for place in places if self._has(place, text)]
        if not found:
            keys = ((p, full_key(self.root.meta, p.name, self.namespace, text)) for p in places)
            found = [(place, key) for place, key in keys if key]
            the_one((key for _, key in found), text, "snapshots")
        return _only(found, text)

    @staticmethod
    def _has(place: Snapshotter, key: str) -> bool:
        try:
            place.stat(key)
        except NotFound:
            return False
        return True

    def snapshotters(self) -> list[Snapshotter]:
        """Return every backend that has been used on this root; `broken` has those that cannot be."""
        return self._used()[0]

    @property
    def broken(self) -> Mapping[str, str]:
        """Say of each backend that was used on this root and cannot be any more, why."""
        return self._used()[1]

    def _used(self) -> tuple[list[Snapshotter], dict[str, str]]:
        folders = [path for path in self.root.snapshots.iterdir() if path.is_dir()]
        # What cannot be printed is no backend's name, and no key can hold it.
        used = {path.name for path in folders if path.name.isprintable()}
        known = [name for name in plugins.names() if name in used]
        working: list[Snapshotter] = []
        broken: dict[str, str] = {}
        for name in (*known, *sorted(used.difference(known))):
            try:
                working.append(self.snapshotter(name))
            except EngineError as error:
                broken[name] = str(error)
        return working, broken

    # -- images -------------------------------------------------------------------------------

    def resolve(self, target: Descriptor, platform: Platform | None = None) -> ResolvedImage:
        """Return the one image that `target` means here, read from the store."""
        return resolve(target, platform or self.platform, self._read)

    def _read(self, descriptor: Descriptor, limit: int) -> bytes:
        return self.content.read_all(descriptor.key, limit)

    def present(self, target: Descriptor, *, coming: bool = False) -> list[ResolvedImage]:
        """Return the images that `target` means and that are here, this machine's first.

        With `coming` also those of which only the documents are here yet.
        """
        return present(target, self.platform, self._read, partial(self._is_here, coming))

    def _is_here(self, coming: bool, descriptor: Descriptor) -> bool:
        try:
            about = self.content.info(descriptor.key).labels
        except (NotFound, Refused):  # or has a digest of a kind that is not known here
            return False
        return coming or is_kept(about)

    # -- mounts -------------------------------------------------------------------------------

    def top_of(self, image: Image, snapshotter: Snapshotter, platform: Platform | None = None) -> str:
        """Return the topmost layer of an unpacked image, "" if it has none. NotFound if not unpacked."""
        resolved = self.resolve(image.target, platform)
        top: str = resolved.chain[-1] if resolved.chain else ""
        if top:
            try:
                snapshotter.stat(top)
            except NotFound:
                raise NotFound(
                    f"image {image.name} is not unpacked for {snapshotter.name}; "
                    f"run `lamina unpack --snapshotter {snapshotter.name} {image.name}`"
                ) from None
        return top

    def umount(self, target: Path, *, lazy: bool = False) -> MountRecord:
        """Undo a mount (`Mounting.umount`), on a full disk too."""
        with self._freeing_space():
            return self.mounting.umount(target, lazy=lazy)

    def remove_snapshots(self, chosen: Sequence[tuple[Snapshotter, str]]) -> Removal:
        """Remove snapshots by hand, with their files, as far as it goes; return what was done.

        It stops with NotFound, or FailedPrecondition where one has children or is mounted.
        """
        removed: list[tuple[Snapshotter, int]] = []
        left: list[Leftover] = []
        failed: EngineError | None = None
        with self._freeing_space():
            seen = _, table = self.mounting.seen_for_removing([key for _, key in chosen])
            try:
                for snapshotter, key in chosen:
                    with self.mounting.removing(snapshotter.name, key, seen):
                        removed.append((snapshotter, snapshotter.remove(key, table=table)))
            except EngineError as error:
                failed = error
            finally:
                for snapshotter, number in removed:
                    left += snapshotter.cleanup(only={number}, table=table)
        return Removal(count=len(removed), left=left, failed=failed)

    def release(self, key: str, name: str | None = None) -> None:
        """Remove what was prepared as `key` for the backend `name`, or for whichever has it.

        NotFound, InvalidArgument if several have it, FailedPrecondition while it is mounted and for a
        committed one: whoever unpacked it may build on it.
        """
        places = [self.snapshotter(name)] if name else self.snapshotters()
        backend, _ = _only([(place, key) for place in places if self._has(place, key)], key)
        if backend.stat(key).kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is a layer; `lamina snapshots rm` removes those")
        self.mounting.check_removable(key)
        table = MountTable.read()
        number = backend.remove(key, table=table)
        _tell(backend.cleanup(only={number}, table=table))

    # -- collection ---------------------------------------------------------------------------

    def collect(self, *, dry_run: bool = False, report: Report = silent) -> Collected:
        """Drop everything that nothing holds, and delete it; with `dry_run` only say what."""
        if dry_run:
            return self._collect(dry_run=True, report=report)
        for environment in (self.root.meta, self.root.blobs):
            environment.check_readers()
        self.root.owners.sweep()
        with self._freeing_space(), self.root.meter.working(Verb.COLLECT):
            seen = _, table = self.mounting.claims.read()
            healed = [snapshot_node(*snapshot) for snapshot in self.mounting.claims.heal(seen)]
            collected = self._collect(dry_run=False, report=report)
            left = self.cleanup(table, report)
        snapshots = [*healed, *collected.snapshots]
        self.root.meter.collected(
            images=len(collected.images),
            content=len(collected.blobs),
            snapshots=len(snapshots),
            ingests=len(collected.ingests),
            leases=len(collected.leases),
            bytes=collected.blob_bytes + collected.snapshot_bytes,
        )
        return msgspec.structs.replace(
            collected,
            snapshots=snapshots,
            left=left,
            errors=[*collected.errors, *self._give_back(report), *self._flush()],
        )

    def enforce(self, policy: Policy, *, dry_run: bool = False, report: Report = silent) -> Enforced:
        """Collect, and remove the images that a policy lets go; with `dry_run` only say what."""
        return enforce(
            self.root.meta,
            self.namespace,
            policy,
            disk=self.disk,
            collect=partial(self.collect, dry_run=dry_run, report=report),
            dry_run=dry_run,
        )

    def disk(self) -> Disk:
        """Return the disk that the root is on; what the root's own files can take again is free."""
        with os_errors(f"root {self.root.path}"):
            found = os.statvfs(self.root.path)
        free = found.f_bavail * found.f_frsize + self.root.blobs.unused()
        return Disk(found.f_blocks * found.f_frsize, free)

    def glance(self, since: int, before: Seen, policy: Policy | None) -> Seen:
        """Look whether there is something to collect, or for a policy to do (`engine.gc.activity`)."""
        seen = glance(self.root.meta, self.namespace, since, before)
        if policy is None:
            return seen
        is_pressed = asks(self.root.meta, self.namespace, policy, self.disk(), seen.at)
        return msgspec.structs.replace(seen, is_pressed=is_pressed)

    def _give_back(self, report: Report) -> Iterator[str]:
        """Give freed pages back to the file system; yield why some stay."""
        for environment, spare in ((self.root.blobs, 0), (self.root.meta, _SPARE)):
            if why := give_back(environment, spare=spare, report=report).why:
                yield f"freed space of {environment.path.name}: {why}"

    def _flush(self) -> Iterator[str]:
        """Flush what was committed without that; yield why it could not be."""
        try:
            flush_waiting(self.root, after_s=0)
        except EngineError as error:
            yield str(error)

    def _collect(self, *, dry_run: bool, report: Report) -> Collected:
        places = self.places(vanished=self.mounting.claims.stale() if dry_run else ())
        paused = self.root.meter.paused
        collected = collect(self.root.meta, places, dry_run=dry_run, report=report, paused=paused)
        reasons = [f"snapshots of {name} stay: {why}" for name, why in self.broken.items()]
        reasons += [f"mount {record.name}: {record.error}" for record in self.mounting.damaged()]
        return msgspec.structs.replace(collected, errors=[*collected.errors, *reasons])

    def places(self, vanished: Collection[tuple[str, str]] = ()) -> Places:
        """Return where a collection looks; `vanished` are the snapshots of mounts that are gone."""
        names = [snapshotter.name for snapshotter in self.snapshotters()]
        return Places(namespace=self.namespace, backends=names, vanished=vanished)

    @contextmanager
    def _freeing_space(self) -> Iterator[None]:
        """Let the block spend the reserve: even forgetting takes space, for a record that says so."""
        self.root.spend_reserve()
        try:
            yield
        finally:
            self.root.keep_reserve()

    def cleanup(self, table: MountTable, report: Report = silent) -> list[Leftover]:
        """Delete the bytes and folders of everything dropped so far; return what resisted."""
        left = [
            leftover
            for snapshotter in self.snapshotters()
            for leftover in _cleared(snapshotter, table, report)
        ]
        self.content.cleanup(report=report)
        plugins.sweep(self.root)
        return left

    def give_up(self, lease: str, *, seconds: float, heir: str = "") -> None:
        """End a lease whose work failed, with what only it held; delete for so long at most.

        A collection deletes the rest. What stays the lease `heir` takes over, if one is named.
        """
        until = time.monotonic() + seconds
        with self._freeing_space():
            held = self.leases.members(lease)
            dropped = give_up(self.root.meta, self.namespace, lease)
            if heir:
                self.leases.take_over(heir, held)
            for name, numbers in dropped.snapshots.items():
                left = until - time.monotonic()
                _tell(self.snapshotter(name).cleanup(only=numbers, seconds=left))
            self.content.cleanup(dropped.blobs, seconds=until - time.monotonic())

    def remove_blob(self, digest: Digest) -> None:
        """Remove a blob that nothing holds. NotFound, FailedPrecondition."""
        number = remove_blob(self.root.meta, self.namespace, digest)
        self.content.cleanup([] if number is None else [number])

    def check(
        self,
        names: Sequence[str] = (),
        *,
        apply: Apply | None = None,
        tell: Callable[[Finding], None] = lambda _finding: None,
        report: Report = silent,
    ) -> Checked:
        """Check the whole root, or the images of some names here; with `apply` repair it too."""
        images = [self.images.get(name) for name in names]
        scope = Scope(namespace=self.namespace, images=images) if names else None
        spending = self._freeing_space() if apply else nullcontext()  # dropping a record takes some too
        with spending, self.root.meter.working(Verb.CHECK):
            return check(self.root, self.platform, scope=scope, apply=apply, tell=tell, report=report)

    def close(self) -> None:
        """Let go of the backends; the root is the caller's to close."""
        for snapshotter in self._snapshotters.values():
            snapshotter.close()


def _only(found: Sequence[tuple[Snapshotter, str]], text: str) -> tuple[Snapshotter, str]:
    if len(found) > 1:
        names = " and ".join(place.name for place, _ in found)
        raise InvalidArgument(f"snapshot {text} is in {names}; say which with --snapshotter")
    if not found:
        raise NotFound(f"no snapshot {text}; `lamina snapshots ls` lists them")
    return found[0]


def _cleared(snapshotter: Snapshotter, table: MountTable, report: Report) -> list[Leftover]:
    """Delete all dropped folders of a backend, for some seconds at a time: a large one takes a while."""
    seconds = _CLEAR_S
    while True:
        report(Step.SWEEP, "folders", 0, 0)
        left = snapshotter.cleanup(table=table, seconds=seconds)
        if all(leftover.reason != UNFINISHED for leftover in left):
            return left
        seconds = min(2 * seconds, _CLEAR_MOST_S)


def _tell(left: Sequence[Leftover]) -> None:
    for leftover in left:
        _log.warning("files of a snapshot stay in %s: %s", leftover.path, leftover.reason)


@contextmanager
def open_stores(
    path: Path,
    namespace: str,
    platform: Platform,
    *,
    readonly: bool = False,
    create: bool = True,
    passed: Callable[[], None] = lambda: None,
) -> Iterator[Stores]:
    """Open the stores at `path` for the length of a block.

    With `create` they are made if need be, with `readonly` nothing is. NotFound where there are none.
    `passed` is called often where opening takes long, and may end it.

    All in this process who open a root share it, whatever their namespaces.
    """
    with open_root(path, readonly=readonly, create=create) as root:
        if not readonly:
            recover(root, passed)
        stores = Stores(root, namespace, platform)
        try:
            yield stores
        finally:
            stores.close()
