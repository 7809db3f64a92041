"""The folder that a store lives in: checked, locked, versioned, its two LMDB files open.

Sync. Layout:

    ROOT/ 0700
      format                    version of everything here; a newer one is refused
      lock                      flock: shared by every process that has the root open
      meta.lmdb/                records (`engine.kv.schema`)
      blobs.lmdb/               bytes (`engine.content.extents`)
      reserve                   space that a collection may spend on a full disk
      snapshots/<backend>/<id>/ a backend owns what is inside
      trash/                    folders on their way out
"""

import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import FailedPrecondition, InvalidArgument, PermissionDenied, os_errors
from engine.kv.environment import Environment
from engine.kv.schema import FORMAT, TABLES

__all__ = ["BLOBS_FILE", "Root", "open_blobs"]

_META_MAP = 1 << 36
_BLOBS_MAP = 1 << 44  # 16 TiB of address space, the largest file of ext4
BLOBS_FILE = "blobs.lmdb"
_RESERVE = 1 << 22  # bytes: some thousand pages for records
_UNSAFE = set(",:\\")  # they separate and escape mount options
_OURS = re.compile(r"lock|format(\.[0-9]+)?")  # what there is before a root is known by its format


class Root:
    """An open root; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open `path`, making it if need be.

        Raises PermissionDenied, InvalidArgument for a path that mount options cannot hold,
        FailedPrecondition for a root of a newer format or of another user.
        """
        with os_errors(f"root {path}"):
            # Symlinks are resolved once, here: mountinfo shows real paths.
            self.path = Path(os.path.realpath(path))
            self._check_name()
            if not self.path.exists():
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check_folder()
            self._lock = self._share_lock()
        self._environments: list[Environment] = []
        try:
            with os_errors(f"root {path}"):
                self._check_format()
                self.snapshots = self._folder("snapshots")
                self.trash = self._folder("trash")
                self._folder("meta.lmdb")
                self._folder(BLOBS_FILE)
            self.keep_reserve()
            self.meta = self._open(Environment, "meta.lmdb", _META_MAP, TABLES)
            self.blobs = self._open(Environment, BLOBS_FILE, _BLOBS_MAP, ())
        except BaseException:
            self.close()
            raise

    def _open(
        self, kind: type[Environment], name: str, map_bytes: int, tables: tuple[str, ...]
    ) -> Environment:
        environment = kind(self.path / name, map_bytes=map_bytes, tables=tables)
        self._environments.append(environment)
        return environment

    def _check_name(self) -> None:
        if _UNSAFE & set(str(self.path)):
            raise InvalidArgument(
                f"root {self.path}: a path with a comma, colon or backslash cannot be mounted from"
            )

    def _check_folder(self) -> None:
        info = self.path.stat()
        if not stat.S_ISDIR(info.st_mode):
            raise InvalidArgument(f"root {self.path} is not a folder")
        if info.st_uid != os.geteuid():
            raise PermissionDenied(f"root {self.path} belongs to user {info.st_uid}, not to you")
        # Another process may be making the root just now: lock first, format next, then the rest.
        names = [path.name for path in self.path.iterdir()]
        foreign = [name for name in names if not _OURS.fullmatch(name) and name != "lost+found"]
        if foreign and not (self.path / "format").exists():
            raise InvalidArgument(f"root {self.path} is in use for something else; name an empty folder")
        if stat.S_IMODE(info.st_mode) & 0o077:
            self.path.chmod(0o700)

    def _share_lock(self) -> int:
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise FailedPrecondition(
                f"root {self.path} is being repaired by another process; wait for it"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _check_format(self) -> None:
        file = self.path / "format"
        try:
            found = int(file.read_text(encoding="ascii"))
        except FileNotFoundError:
            fresh = self.path / f"format.{os.getpid()}"
            self._write_format(fresh)
            fresh.replace(file)
            return
        except ValueError:
            raise FailedPrecondition(f"{file} does not hold a version") from None
        if found > FORMAT:
            raise FailedPrecondition(
                f"root {self.path} has format {found}, this lamina knows {FORMAT}; upgrade lamina"
            )

    @staticmethod
    def _write_format(file: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o600)
        try:
            os.write(descriptor, f"{FORMAT}\n".encode())
            os.fsync(descriptor)  # an empty file after a power loss would lock everyone out
        finally:
            os.close(descriptor)

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True, mode=0o700)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise FailedPrecondition(f"{folder} is not a folder of lamina's; move it away")
        return folder

    def keep_reserve(self) -> None:
        """Hold some space back, if there is any to hold."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):  # a full disk: what cannot be held is not there to be spent
            reserve = os.open(self.path / "reserve", flags, 0o600)
            try:
                os.posix_fallocate(reserve, 0, _RESERVE)
            finally:
                os.close(reserve)

    def spend_reserve(self) -> None:
        """Give the space held back to a collection that a full disk would otherwise stop."""
        (self.path / "reserve").unlink(missing_ok=True)

    def close(self) -> None:
        """Close everything; may be called again."""
        while self._environments:
            self._environments.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_blobs(root: Path) -> Environment:
    """Open only the bytes of blobs, to read them: for a worker process."""
    return Environment(root / BLOBS_FILE, map_bytes=_BLOBS_MAP, readonly=True)
