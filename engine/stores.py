"""Everything that a root holds, opened together: the sync half of the engine.

Sync; safe from any thread. The command line uses it without an event loop, `engine.app` on threads.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engine import labels, plugins
from engine.content.image import ResolvedImage, resolve
from engine.content.store import ContentStore
from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.gc.collect import Collected, collect, give_up, remove_blob
from engine.kv.schema import Image
from engine.metadata.images import ImageStore
from engine.mount import Mount, activate, deactivate, is_made_of, is_mounted
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.root import Root, open_root
from engine.snapshots import Info, Kind, Snapshotter

__all__ = ["MOUNT_KEY", "Stores", "open_stores"]

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*\Z")  # containerd's identifiers
_NAMESPACE_LIMIT = 76

MOUNT_KEY = "mount "
"""What the key of a snapshot that `mount` made begins with; its target follows."""


class Stores:
    """The stores of one namespace on an open root."""

    def __init__(self, root: Root, namespace: str, platform: Platform) -> None:
        if len(namespace) > _NAMESPACE_LIMIT or not _NAMESPACE.match(namespace):
            raise InvalidArgument(f"{namespace!r} is not a namespace; use letters and digits")
        self.root = root
        self.namespace = namespace
        self.platform = platform
        self.content = ContentStore(root.meta, root.blobs, namespace)
        self.images = ImageStore(root.meta, namespace)
        self._snapshotters: dict[str, Snapshotter] = {}
        self._default: str | None = None

    def snapshotter(self, name: str | None = None) -> Snapshotter:
        """Return a backend by name, or the best that works here. InvalidArgument, NotSupported."""
        if name is None:
            # Found out by mounting, so once is enough.
            self._default = self._default or plugins.default_name(self.root)
            name = self._default
        if name not in self._snapshotters:
            self._snapshotters[name] = plugins.create(self.root, name, self.namespace)
        return self._snapshotters[name]

    def holder(self, key: str) -> Snapshotter:
        """Return the backend that has the snapshot `key`. NotFound."""
        for snapshotter in self.snapshotters():
            try:
                snapshotter.stat(key)
            except NotFound:
                continue
            return snapshotter
        raise NotFound(f"no snapshot {key}; `lamina snapshots ls` lists them")

    def snapshotters(self) -> list[Snapshotter]:
        """Return every backend that has been used on this root; `broken` has those that cannot be."""
        return self._used()[0]

    @property
    def broken(self) -> Mapping[str, str]:
        """Say of each backend that was used on this root and cannot be any more, why."""
        return self._used()[1]

    def _used(self) -> tuple[list[Snapshotter], dict[str, str]]:
        used = {path.name for path in self.root.snapshots.iterdir() if path.is_dir()}
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

    def unpacked_into(self, image: ResolvedImage) -> dict[str, str]:
        """Return the chain ID of an image under each backend that has it unpacked.

        What was removed by hand since is left out: a label may outlive what it names.
        """
        blob = self.content.info(image.manifest.config.key)
        there = {(backend.name, info.key) for backend in self.snapshotters() for info in backend.walk()}
        return {name: key for name, key in labels.snapshot_refs(blob.labels) if (name, key) in there}

    # -- mounts -------------------------------------------------------------------------------

    def mount_point(self, target: Path) -> Path:
        """Return the folder that `target` means if it is free to mount on; raise what `mount` would."""
        target = Path(os.path.realpath(target))
        if not target.is_dir():
            raise NotFound(f"{target} is not a folder; make it first")
        try:
            str(target).encode()
        except UnicodeEncodeError:
            raise InvalidArgument("the name of a mount point must be UTF-8") from None
        root = self.root.path
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise InvalidArgument(f"{target} and the store at {root} overlap; mount somewhere else")
        if is_mounted(target):
            raise FailedPrecondition(f"something is mounted at {target}; unmount it first")
        return target

    def mount(self, image: Image, snapshotter: Snapshotter, target: Path, *, rw: bool) -> Info:
        """Mount an unpacked image at a folder: read-only, or with a writable snapshot of its own.

        A writable snapshot that an earlier mount left at the same target is used again. Raises
        NotFound for an image that is not unpacked, FailedPrecondition for a target in use.
        """
        target = self.mount_point(target)
        parent = self._top(image, snapshotter)
        key = f"{MOUNT_KEY}{target}"
        mounts, is_new = self._snapshot_for(snapshotter, key, parent, rw=rw)
        try:
            activate(mounts, target)
        except BaseException:
            if is_new:
                self._drop(snapshotter, key)
            raise
        return snapshotter.stat(key)

    def _top(self, image: Image, snapshotter: Snapshotter) -> str:
        resolved = self.resolve(image.target)
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

    def _snapshot_for(
        self, snapshotter: Snapshotter, key: str, parent: str, *, rw: bool
    ) -> tuple[Sequence[Mount], bool]:
        """Return mounts, and whether the snapshot they are of was made for them."""
        make = snapshotter.prepare if rw else snapshotter.view
        try:
            return make(key, parent), True
        except AlreadyExists:
            old = snapshotter.stat(key)
        if old.kind == Kind.VIEW:  # left over from before a reboot: nothing in it is anybody's
            self._drop(snapshotter, key)
            return make(key, parent), True
        if rw and old.parent == parent:
            return snapshotter.mounts(key), False
        raise AlreadyExists(
            f"a writable snapshot of an earlier mount is kept for this target; mount it again with "
            f"--rw and its image, or remove it: `lamina snapshots rm '{key}'`"
        )

    def umount(self, target: Path) -> Info:
        """Undo `mount`; a writable snapshot stays, a read-only one goes. NotFound if there is none."""
        target = target.absolute()
        for candidate in (Path(os.path.realpath(target)), target):
            key = f"{MOUNT_KEY}{candidate}"
            for snapshotter in self.snapshotters():
                try:
                    info = snapshotter.stat(key)
                except NotFound:
                    continue
                if is_mounted(candidate):
                    if not is_made_of(candidate, self.root.snapshots):
                        raise FailedPrecondition(
                            f"what is mounted at {candidate} now is not lamina's; unmount that first"
                        )
                    deactivate(candidate)
                if info.kind == Kind.VIEW:
                    self._drop(snapshotter, key)
                return info
        raise NotFound(f"lamina has mounted nothing at {target}")

    @staticmethod
    def remove_snapshot(snapshotter: Snapshotter, key: str) -> None:
        """Remove a snapshot by hand. NotFound, FailedPrecondition with children or while mounted."""
        target = key.removeprefix(MOUNT_KEY)
        # A mounted view is made of its parents' folders alone: only its key tells where it is.
        if target != key and is_mounted(Path(target)):
            raise FailedPrecondition(f"snapshot {key} is mounted; run `lamina umount {target}` first")
        snapshotter.remove(key)

    @staticmethod
    def _drop(snapshotter: Snapshotter, key: str) -> None:
        snapshotter.remove(key)
        snapshotter.cleanup()

    # -- collection ---------------------------------------------------------------------------

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Drop everything that nothing holds, and delete it; with `dry_run` only say what."""
        if dry_run:
            return self._collect(dry_run=True)
        for environment in (self.root.meta, self.root.blobs):
            environment.check_readers()
        self.root.owners.sweep()
        with self._freeing_space():
            collected = self._collect()
            self.cleanup()
        return collected

    def _collect(self, *, dry_run: bool = False) -> Collected:
        broken = self.broken
        collected = collect(
            self.root.meta, self.namespace, self._backends(), kept=broken, dry_run=dry_run
        )
        reasons = [f"snapshots of {name} stay: {why}" for name, why in broken.items()]
        return msgspec.structs.replace(collected, errors=[*collected.errors, *reasons])

    @contextmanager
    def _freeing_space(self) -> Iterator[None]:
        """Let the block spend the reserve: even forgetting takes space, for a record that says so."""
        self.root.spend_reserve()
        try:
            yield
        finally:
            self.root.keep_reserve()

    def _backends(self) -> list[str]:
        return [snapshotter.name for snapshotter in self.snapshotters()]

    def cleanup(self) -> None:
        """Delete the bytes and folders of everything dropped so far."""
        for snapshotter in self.snapshotters():
            snapshotter.cleanup()
        self.content.cleanup()
        plugins.sweep(self.root)

    def give_up(self, lease: str) -> None:
        """End a lease whose work failed, with what only it held."""
        with self._freeing_space():
            give_up(self.root.meta, self.namespace, self._backends(), lease, kept=self.broken)
            self.cleanup()

    def remove_blob(self, digest: Digest) -> None:
        """Remove a blob that nothing holds. NotFound, FailedPrecondition."""
        remove_blob(self.root.meta, self.namespace, self._backends(), digest, kept=self.broken)
        self.content.cleanup()

    def close(self) -> None:
        """Let go of the backends; the root is the caller's to close."""
        for snapshotter in self._snapshotters.values():
            snapshotter.close()


@contextmanager
def open_stores(
    path: Path, namespace: str, platform: Platform, *, readonly: bool = False
) -> Iterator[Stores]:
    """Open the stores at `path` for the length of a block, made if need be unless `readonly`.

    All in this process who open a root share it, whatever their namespaces.
    """
    with open_root(path, readonly=readonly) as root:
        stores = Stores(root, namespace, platform)
        try:
            yield stores
        finally:
            stores.close()
