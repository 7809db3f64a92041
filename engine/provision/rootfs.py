"""Makes the root file systems of a container, mounts them again, and unmakes them.

Sync; safe from any thread and process. What is done here is to a container that the caller holds; its
record and those of its mounts say where everything is. Nothing here reads the table of mounts unless
something is not as it was left: what it costs does not grow with the number of mounts.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import msgspec

from engine import limits
from engine.errors import DataLoss, EngineError, FailedPrecondition, NotFound, os_errors
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import remove_entry
from engine.kv.schema import CONTAINERS, Container
from engine.metadata.mounts import MountRecord, MountState, MountStore
from engine.mount import Mount, activate, deactivate, grows_with, writes_to
from engine.mounts.claims import anew, id_of
from engine.mounts.holders import occupied
from engine.mounts.table import MountID, MountTable, here, is_mounted, mount_id
from engine.oci.digest import parse_digest
from engine.processes import boot_id
from engine.provision.places import all_folders, folder_of, is_unique, mount_keys, target_of
from engine.provision.provisioned import Provisioned
from engine.provision.quota import change_limit, limit
from engine.snapshots import Leftover, Snapshotter, Usage
from engine.stores import Stores

__all__ = ["RootFileSystems", "Sight", "joined"]

_log = logging.getLogger(__name__)

# What a container had mounted is unmounted by then, and nobody else mounts it.
_NOTHING_MOUNTED = MountTable.blank()


class Sight:
    """What is mounted where, and who is in it: looked at once for many, when first asked."""

    @cached_property
    def table(self) -> MountTable:
        """The kernel's table of mounts."""
        return MountTable.read()

    @cached_property
    def occupied(self) -> set[MountID]:
        """The mounts that some process is in, those among it that no table shows. Raises Unavailable."""
        return occupied()


class RootFileSystems:
    """The root file systems of the containers of some stores."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._root = stores.root.path
        self._mounts = MountStore(stores.root.meta, stores.namespace)

    # -- making -------------------------------------------------------------------------------

    def make(self, mine: Container, claims: Sequence[MountRecord]) -> Provisioned:
        """Make and mount what a container claims, all of it, and note that it is provisioned.

        What fails is left to `unmake`. FailedPrecondition if somebody moved the container.
        """
        config = self._config(mine)
        folder = folder_of(self._root, mine.unique)
        with os_errors(f"container {mine.id}"):
            _make_folders(folder, claims)
        done: list[MountRecord] = []
        mounts: list[Sequence[Mount]] = []
        errors: list[EngineError] = []
        for claim in claims:
            try:
                self._check_mine(mine)
                mounts.append(self._prepare(claim, mine.quota))
                hit("provision.prepared")
                done.append(_mount(claim, mounts[-1]))
                hit("provision.mounted")
            except EngineError as error:
                errors.append(error)
        if errors:
            raise joined(errors)
        container = self._stores.provisions.settle(mine, done)
        hit("provision.settled")
        return self._told(container, config, mounts[0])

    def _prepare(self, claim: MountRecord, quota: int) -> list[Mount]:
        backend = self._stores.snapshotter(claim.backend)
        make = backend.prepare if claim.rw else backend.view
        mounts = make(claim.key, claim.top)
        grows = list(grows_with(mounts))
        if quota and grows:
            limit(grows, quota)
        return mounts

    def _check_mine(self, mine: Container) -> None:
        if self._stores.containers.get(mine.id) != mine:
            raise FailedPrecondition(f"container {mine.id} was changed meanwhile")

    def provisioned(self, container: Container) -> Provisioned:
        """Return what was made of a container that is there. Raises NotFound for its snapshot."""
        key = mount_keys(container)[0]
        mounts = self._stores.snapshotter(container.backend).mounts(key)
        return self._told(container, self._config(container), mounts)

    def _told(self, container: Container, config: bytes, mounts: Sequence[Mount]) -> Provisioned:
        folder = folder_of(self._root, container.unique)
        paths = enumerate(sorted(container.volumes), 1)
        return Provisioned(
            container=container,
            folder=folder,
            rootfs=target_of(folder, 0),
            config=config,
            volumes={path: target_of(folder, number) for number, path in paths},
            grows=tuple(grows_with(mounts)),
            mounts=tuple(mounts),
        )

    def _config(self, container: Container) -> bytes:
        return self._stores.content.read_all(parse_digest(container.config), limits.CONFIG)

    def resize(self, container: Container, quota: int) -> None:
        """Change how much may be in what a container writes to. FailedPrecondition without a limit."""
        mounts = self._stores.snapshotter(container.backend).mounts(mount_keys(container)[0])
        written = writes_to(mounts)
        if written and quota != container.quota:
            change_limit(written, quota)

    # -- mounting again -----------------------------------------------------------------------

    def is_whole(self, container: Container) -> bool:
        """Say whether all that a container has is mounted, as far as this mount namespace shows."""
        return container.boot == boot_id() and not list(self._missing(container))

    def _missing(self, container: Container) -> Iterator[int]:
        folder = folder_of(self._root, container.unique)
        for number in range(len(container.volumes) + 1):
            target = target_of(folder, number)
            if not (target.exists() and is_mounted(target)):
                yield number

    def restore(self, mine: Container, sight: Sight) -> list[MountRecord]:
        """Mount what a container has and is not mounted any more; return the records of that.

        FailedPrecondition for what is in use where it cannot be seen from here; DataLoss for what is
        gone. What was mounted before an error stays: it is not missing the next time.
        """
        hit("restore.held")
        folder = folder_of(self._root, mine.unique)
        done: list[MountRecord] = []
        for number in self._missing(mine):
            key = mount_keys(mine)[number]
            record = self._mounts.get(key)
            if record is None:
                raise DataLoss(f"container {mine.id} has lost its mount {key}; remove it")
            with os_errors(f"container {mine.id}"):
                _make_folders(folder, [record])
            try:
                mounts = self._stores.snapshotter(record.backend).mounts(key)
            except NotFound:
                raise DataLoss(f"container {mine.id} has lost its snapshot {key}; remove it") from None
            self._check_unused(record, mounts, sight)
            done.append(_mount(anew(record), mounts))
            hit("restore.mounted")
        return done

    def _check_unused(self, record: MountRecord, mounts: Sequence[Mount], sight: Sight) -> None:
        """See that nobody of this boot writes where what is mounted anew would write."""
        written = writes_to(mounts)
        if record.boot != boot_id() or written is None:
            return
        if sight.table.uses(written) or id_of(record) in sight.occupied:
            raise FailedPrecondition(
                f"container {record.container} is still mounted where it cannot be seen from here; "
                "end what runs in it first"
            )

    # -- unmaking -----------------------------------------------------------------------------

    def unmake(self, mine: Container) -> None:
        """Unmount and remove all that a container has, its record last.

        What it can do it does, and raises what went wrong: asked again, it does the rest.
        """
        keys = mount_keys(mine)
        records = [record for key in keys if (record := self._mounts.get(key))]
        # Before anything is touched: whose backend cannot be loaded stays as it is.
        backends = {name: self._stores.snapshotter(name) for name in {r.backend for r in records}}
        self._check_seen(records)
        errors: list[EngineError] = []
        for record in reversed(records):
            try:
                _take_down(Path(record.target))
            except EngineError as error:
                errors.append(error)
        if errors:
            raise joined(errors)
        hit("destroy.unmounted")
        for record in reversed(records):
            try:
                _discard(backends[record.backend], record.key)
            except EngineError as error:
                errors.append(error)
        if errors:
            raise joined(errors)
        hit("destroy.discarded")
        self._remove_folder(mine.unique)
        hit("destroy.emptied")
        self._stores.provisions.gone(mine, keys)

    def _check_seen(self, records: Iterable[MountRecord]) -> None:
        """See that nothing is mounted where this process could not unmount it."""
        others = [r for r in records if r.space != here() and r.boot == boot_id() and r.mount_id]
        if others:
            table = MountTable.read()
            for record in others:
                entry = table.find_anywhere(id_of(record), record.device)
                if entry and table.find(id_of(record), record.device) is None:
                    raise FailedPrecondition(
                        f"container {record.container} is mounted in another mount namespace; "
                        "remove it from there"
                    )

    def _remove_folder(self, unique: str) -> None:
        """Remove the folder of a container; what resists waits for the next `recover`."""
        try:
            with folder_descriptor(all_folders(self._root)) as folders, suppress(FileNotFoundError):
                remove_entry(folders, unique.encode())
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("the folder of container %s stays for now: %s", unique, error.strerror)

    def sweep(self, known: Callable[[], Collection[str]]) -> None:
        """Remove the folders of containers that are gone; `known` are those that are there by now.

        What is not a container's stays, with a warning.
        """
        try:
            names = sorted(os.listdir(all_folders(self._root)))
        except FileNotFoundError:
            return
        uniques = known()  # after the folders: a record comes before its folder
        for name in names:
            if not is_unique(name):
                _log.warning("%s is nothing of lamina's", all_folders(self._root) / name)
            elif name not in uniques:
                folder = folder_of(self._root, name)
                volumes = folder / "volumes"
                below = [volumes / one for one in os.listdir(volumes)] if volumes.is_dir() else []
                for target in (*below, folder / "rootfs"):
                    _take_down(target)
                self._remove_folder(name)

    def uniques(self) -> set[str]:
        """Return what names the folders of all containers of the store, of any namespace."""
        with self._stores.root.meta.read() as txn:
            found, damaged = CONTAINERS.survey(txn)
        if damaged:  # whose folder that is, nobody knows
            return {name for name in os.listdir(all_folders(self._root)) if is_unique(name)}
        return {one.unique for one in found}

    # -- asking -------------------------------------------------------------------------------

    def usage(self, container: Container) -> dict[str, Usage]:
        """Return what each root file system of a container itself takes up, by its path in it."""
        backend = self._stores.snapshotter(container.backend)
        paths = ["/", *sorted(container.volumes)]
        keys = mount_keys(container)
        return {path: backend.usage(key) for path, key in zip(paths, keys, strict=True)}


def _make_folders(folder: Path, records: Iterable[MountRecord]) -> None:
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for record in records:
        target = Path(record.target)
        if target.parent != folder:
            target.parent.mkdir(mode=0o700, exist_ok=True)
        target.mkdir(mode=0o700, exist_ok=True)


def _mount(claim: MountRecord, mounts: Sequence[Mount]) -> MountRecord:
    """Mount what a record claims; return it with what the kernel knows that by."""
    target = Path(claim.target)
    activate(mounts, target)
    found = mount_id(target)
    device = ""
    if not found.unique:
        number = target.stat().st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
    return msgspec.structs.replace(
        claim, state=MountState.MOUNTED, mount_id=found.id, unique_id=found.unique, device=device
    )


def _take_down(target: Path) -> None:
    """Take all that is mounted at a folder of ours out of sight, whoever is in it."""
    while target.exists() and is_mounted(target):
        deactivate(target, lazy=True)


def _discard(backend: Snapshotter, key: str) -> None:
    left: list[Leftover] = []
    with suppress(NotFound):
        number = backend.remove(key, table=_NOTHING_MOUNTED)
        left = backend.cleanup(only={number}, table=_NOTHING_MOUNTED)
    for one in left:  # nothing has it any more, and a collection deletes it
        _log.warning("files of snapshot %s stay in %s: %s", key, one.path, one.reason)


def joined(errors: Sequence[EngineError]) -> EngineError:
    """Return what stands for errors of several parts of one thing: the first, which tells of all."""
    if len(errors) == 1:
        return errors[0]
    texts = dict.fromkeys(map(str, errors))
    kind = type(errors[0]) if len({type(error) for error in errors}) == 1 else EngineError
    try:
        return kind("; ".join(texts))
    except TypeError:  # an error that is made of other things than a text
        return EngineError("; ".join(texts))
