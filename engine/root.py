"""The folder that a store lives in: checked, locked, versioned, its two LMDB files open.

Sync. Layout:

    ROOT/ 0700
      format                    version of everything here; a newer one is refused
      lock                      flock: shared by every process that has the root open
      boot, recovery            in which it was last put in order, who is at it (`engine.recovery`)
      readers                   whose bytes are being read (`engine.content.holds`)
      layers                    which layers are being made (`engine.unpack.layer_locks`)
      owners/                   a locked file for each process at work (`engine.processes`)
      meta.lmdb/                records (`engine.kv.schema`)
      blobs.lmdb/               bytes (`engine.content.extents`)
      reserve                   space that a collection may spend on a full disk
      snapshots/<backend>/<id>/ a backend owns what is inside
      containers/<unique>/      where the images of a container are mounted (`engine.provision.places`)
      trash/                    folders on their way out
      containers/<unique>/      a container's mounts, bundle, log, end (`engine.provision.places`,
                                `engine.running.monitor`)
      runtime/                  what the OCI runtime knows of containers; its own
"""

import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    os_errors,
)
from engine.fs.durable import flush, flush_names
from engine.fs.locks import holders, lock, named
from engine.kv.environment import Environment
from engine.kv.opening import is_there
from engine.kv.schema import COUNTERS, FORMAT, TABLES
from engine.metadata.upgrade import from_format_1
from engine.observing.metering import Meter
from engine.processes import Owners

__all__ = ["BLOBS_FILE", "Root", "open_blobs", "open_root"]

_META_MAP = 1 << 36
_BLOBS_MAP = 1 << 44  # 16 TiB of address space, the largest file of ext4
BLOBS_FILE = "blobs.lmdb"
_RESERVE = 1 << 22  # bytes: some thousand pages for records
_SHARE = 16  # of what is free one such part at most, so that holding it takes nothing that is needed now
_UNSAFE = set(",:\\")  # they separate and escape mount options
_OURS = re.compile(r"lock|format(\.[0-9]+)?")  # what there is before a root is known by its format


class Root:
    """An open root; a context manager. One process opens a root once: see `open_root`."""

    def __init__(
        self, path: Path, *, readonly: bool = False, create: bool = True, alone: bool = False
    ) -> None:
        """Open `path`, making it if need be; with `readonly` nothing is made or changed in it.

        With `alone` nobody else may have it open, now or until it is closed.

        Raises PermissionDenied, InvalidArgument for a path that mount options cannot hold,
        FailedPrecondition for a root of a newer format or of another user, or that others have open,
        and NotFound where there is none and it is to be read, or not to be made.
        """
        self.readonly = readonly
        self._creates = create and not readonly
        self._held: list[int] = []
        self._environments: list[Environment] = []
        # Symlinks are resolved once, here: mountinfo shows real paths.
        self.path = Path(os.path.realpath(path))
        self.owners = Owners(self.path / "owners")
        self.meter = Meter()
        self._format = FORMAT
        try:
            with os_errors(f"root {path}"):
                self._check_name()
                if self._creates:
                    self._make()
                self._check_folder()
                self._lock(alone=alone)
                self._check_format()
                self.snapshots = self._folder("snapshots")
                self.trash = self._folder("trash")
                self._folder("meta.lmdb")
                self._folder(BLOBS_FILE)
                if not readonly:  # to read, a store from before there were these is fine
                    self._folder("owners")
                    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    os.close(os.open(self.path / "readers", flags, 0o600))
            self._check_whole()
            if not readonly:
                self.keep_reserve()
            self.meta = self._open("meta.lmdb", _META_MAP, TABLES)
            self._check_bytes()
            self.blobs = self._open(BLOBS_FILE, _BLOBS_MAP, ())
            if self._format < FORMAT:
                self._upgrade(alone=alone)
            if not readonly:  # who made them may have died before this
                with os_errors(f"root {path}"):
                    flush_names(self.path / "meta.lmdb", self.path / BLOBS_FILE, self.path)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, map_bytes: int, tables: tuple[str, ...]) -> Environment:
        environment = Environment(
            self.path / name,
            map_bytes=map_bytes,
            tables=tables,
            readonly=self.readonly,
            owners=self.owners,
            grows_ahead=bool(tables),
        )
        self._environments.append(environment)
        return environment

    def _check_whole(self) -> None:
        """Raise DataLoss if there is something, but not the records of it: they are made first."""
        # In this order: another process may be making all of it just now.
        has_more = is_there(self.path / BLOBS_FILE) or any(self.snapshots.glob("*/*"))
        if has_more and not is_there(self.path / "meta.lmdb"):
            raise DataLoss(f"root {self.path}: meta.lmdb is missing; restore it from a backup")

    def _check_bytes(self) -> None:
        """Raise DataLoss if there are records, but not the file that is made before the first."""
        with self.meta.read() as txn:
            had_blobs = COUNTERS.last(txn, "blob") > 0
        if had_blobs and not is_there(self.path / BLOBS_FILE):
            raise DataLoss(f"root {self.path}: blobs.lmdb is missing; restore it from a backup")

    def _none(self) -> NotFound:
        return NotFound(f"no store at {self.path}; `lamina import` makes one, --root names another")

    def _check_name(self) -> None:
        if _UNSAFE & set(str(self.path)):
            raise InvalidArgument(
                f"root {self.path}: a path with a comma, colon or backslash cannot be mounted from"
            )
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"root {self.path}: the path must be UTF-8") from None

    def _make(self) -> None:
        """Make the folder and those above it, and be sure of their names."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        if missing:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        flush_names(*(folder.parent for folder in missing))

    def _check_folder(self) -> None:
        try:
            # Held open, so that no other folder can get its number while it is known by it.
            self._held.append(os.open(self.path, os.O_PATH | os.O_CLOEXEC))
        except FileNotFoundError:
            raise self._none() from None
        info = self.path.stat()
        if not stat.S_ISDIR(info.st_mode):
            raise InvalidArgument(f"root {self.path} is not a folder")
        if info.st_uid != os.geteuid():
            raise PermissionDenied(f"root {self.path} belongs to user {info.st_uid}, not to you")
        # Another process may be making the root just now: lock first, format next, then the rest.
        names = [path.name for path in self.path.iterdir()]
        foreign = [name for name in names if not _OURS.fullmatch(name) and name != "lost+found"]
        is_known = (self.path / "format").exists()
        if foreign and not is_known:
            raise InvalidArgument(f"root {self.path} is in use for something else; name an empty folder")
        if not is_known and not self._creates:
            raise self._none()
        if stat.S_IMODE(info.st_mode) & 0o077 and not self.readonly:
            self.path.chmod(0o700)

    def _lock(self, *, alone: bool) -> None:
        make = 0 if self.readonly else os.O_CREAT
        try:
            self._held.append(_locked(self.path, alone=alone, make=make))
        except FileNotFoundError:
            return  # to read a store without one, as where it cannot be written

    def _check_format(self) -> None:
        file = self.path / "format"
        try:
            found = int(file.read_text(encoding="ascii"))
        except FileNotFoundError:
            self._put_format()
            return
        except ValueError:
            raise FailedPrecondition(f"{file} does not hold a version") from None
        if found > FORMAT:
            raise FailedPrecondition(
                f"root {self.path} has format {found}, this lamina knows {FORMAT}; upgrade lamina"
            )
        if found < FORMAT and self.readonly:
            raise FailedPrecondition(
                f"root {self.path} has format {found}; `lamina gc` brings it up to {FORMAT}"
            )
        self._format = found

    def _put_format(self) -> None:
        fresh = self.path / f"format.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as opened:
            opened.write(f"{FORMAT}\n".encode())
            opened.flush()
            flush(opened.fileno())  # an empty file after a power loss would lock everyone out
        fresh.replace(self.path / "format")

    def _upgrade(self, *, alone: bool) -> None:
        """Bring an older format up, with nobody else here: they may know only the older one."""
        file = self._held[-1]
        if not lock(file, alone=True):
            others = named([pid for pid in holders(file) if pid != os.getpid()])
            raise FailedPrecondition(
                f"root {self.path} has format {self._format} and is in use by {others}; end that first"
            )
        from_format_1(self.meta)
        with os_errors(f"root {self.path}"):
            self._put_format()
        lock(file, alone=alone)

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if not self.readonly:
            folder.mkdir(exist_ok=True, mode=0o700)
        try:
            info = folder.lstat()
        except FileNotFoundError:  # its maker died, or is not done
            raise self._none() from None
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise FailedPrecondition(f"{folder} is not a folder of lamina's; move it away")
        return folder

    def keep_reserve(self) -> None:
        """Hold some space back: a small part of what is free."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):  # what cannot be held is not there to be spent
            disk = os.statvfs(self.path)
            size = min(_RESERVE, disk.f_bavail * disk.f_frsize // _SHARE)
            reserve = os.open(self.path / "reserve", flags, 0o600)
            try:
                os.posix_fallocate(reserve, 0, size)
            except OSError:
                # A quota, or a disk that others fill: what was had until then is all that there was.
                self.spend_reserve()
            finally:
                os.close(reserve)

    def spend_reserve(self) -> None:
        """Give the space held back to a collection that a full disk would otherwise stop."""
        (self.path / "reserve").unlink(missing_ok=True)

    def close(self) -> None:
        """Close everything; may be called again."""
        while self._environments:
            self._environments.pop().close()
        self.owners.close()
        while self._held:
            os.close(self._held.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_shared: dict[tuple[int, int], Root] = {}
_users: Counter[tuple[int, int]] = Counter()
_sharing = threading.RLock()  # the collector may end a forgotten `open_root` within another


@contextmanager
def open_root(path: Path, *, readonly: bool = False, create: bool = True) -> Iterator[Root]:
    """Open a root for the length of a block; all in this process who open it share one.

    Raises what `Root` does, and FailedPrecondition to write where it is open read-only.
    """
    with _sharing:
        root = _shared.get(_identity(path)) or Root(path, readonly=readonly, create=create)
        if root.readonly and not readonly:
            raise FailedPrecondition(f"root {path} is open read-only in this process; close that first")
        identity = _identity(root.path)
        _shared[identity] = root
        _users[identity] += 1
    try:
        yield root
    finally:
        with _sharing:
            _users[identity] -= 1
            if not _users[identity]:
                del _shared[identity], _users[identity]
                root.close()


def _identity(path: Path) -> tuple[int, int]:
    """Return what a folder is, whatever it is called; nothing that exists if there is none."""
    try:
        info = path.stat()
    except OSError:
        return (0, 0)
    return info.st_dev, info.st_ino


def _locked(root: Path, *, alone: bool = False, make: int = 0) -> int:
    """Open and lock the lock of a root. FileNotFoundError, FailedPrecondition."""
    file = os.open(root / "lock", os.O_RDONLY | make | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not lock(file, alone=alone):
            others = named(holders(file))
            raise FailedPrecondition(
                f"root {root} is in use by {others}; wait for that, or end it"
                if alone
                else f"root {root} is locked by another process (flock: {others}); wait for it"
            )
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def open_blobs(root: Path) -> Iterator[Environment]:
    """Open only the bytes of blobs, to read them, for the length of a block: for a worker process."""
    with os_errors(f"root {root}"):
        file = _locked(root, make=os.O_CREAT)
    try:
        blobs = Environment(root / BLOBS_FILE, map_bytes=_BLOBS_MAP, readonly=True)
        try:
            yield blobs
        finally:
            blobs.close()
    finally:
        os.close(file)
