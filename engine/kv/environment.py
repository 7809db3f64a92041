"""One LMDB file: opened once per process, with read and write transactions.

Sync; safe from any thread. A write transaction belongs to the thread that began it and is never open
across slow work. LMDB's defaults (sync, metasync, no writemap) stay: what a commit returned survives
power loss, and a full disk is an error, not a SIGBUS. A process that was forked from one with an open
environment must not touch it; lamina only starts helpers by exec.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from engine.errors import (
    DataLoss,
    EngineError,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    from_os_error,
)
from engine.fs.kernel import release_mapped

__all__ = ["Environment", "Transaction"]

_ROOM = 32 << 20  # bytes free below which a failed write means that the disk is full
_READERS = 1024  # slots of readers over all processes; LMDB's default of 126 is few for a daemon

_KINDS: tuple[tuple[type[Exception], type[EngineError], str], ...] = (
    (lmdb.MapFullError, ResourceExhausted, "the store has reached its largest size"),
    (lmdb.ReadersFullError, Unavailable, "too many readers; try again"),
    (lmdb.TlsFullError, Unavailable, "too many environments; try again"),
    (lmdb.VersionMismatchError, FailedPrecondition, "written by another LMDB format"),
    (lmdb.InvalidError, DataLoss, "not an LMDB file; restore it from a backup"),
    (lmdb.CorruptedError, DataLoss, "a page is damaged; restore it from a backup"),
    (lmdb.PageNotFoundError, DataLoss, "a page is missing; restore it from a backup"),
    (lmdb.ReadonlyError, PermissionDenied, "opened read-only"),
)


class Transaction:
    """A running transaction over the tables of one environment."""

    __slots__ = ("databases", "raw")

    def __init__(self, raw: lmdb.Transaction, databases: dict[str, "lmdb._Database"]) -> None:
        self.raw = raw
        self.databases = databases


class Environment:
    """An open LMDB file, a folder of its own at `path`."""

    def __init__(
        self, path: Path, *, map_bytes: int, tables: Sequence[str] = (), readonly: bool = False
    ) -> None:
        """Open `path` and its named tables, making what is missing.

        `map_bytes` is address space, not disk: the file grows as it is written.
        """
        self._path = path
        with self._mapped():
            self._env = lmdb.open(
                os.fspath(path),
                map_size=map_bytes,
                max_dbs=len(tables),
                max_readers=_READERS,
                mode=0o600,
                create=not readonly,
                readonly=readonly,
                lib_version=0,
            )
            self.check_readers()
            # In one write transaction: LMDB publishes handles only when such a one commits. It writes
            # nothing where all tables exist.
            with self._env.begin(write=bool(tables)) as txn:
                self._databases = {name: self._env.open_db(name.encode(), txn=txn) for name in tables}

    def close(self) -> None:
        """Close the file; transactions of it must have ended."""
        self._env.close()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Give a consistent view. Values are memoryviews on the map, dead when the block ends."""
        with self._mapped(), self._env.begin(buffers=True) as raw:
            yield Transaction(raw, self._databases)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Give the one writer's view; commit when the block ends, undo all of it on an error."""
        with self._mapped(), self._env.begin(write=True, buffers=True) as raw:
            yield Transaction(raw, self._databases)

    def check_readers(self) -> None:
        """Free the slots of readers that died: pages that they saw could never be used again."""
        self._env.reader_check()

    def release_pages(self) -> None:
        """Give back the memory of pages read so far; for readers of much."""
        release_mapped(self._path / "data.mdb")

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise self._from_lmdb(error) from error

    def _from_lmdb(self, error: lmdb.Error) -> EngineError:
        doing = f"store {self._path}"
        for foreign, kind, advice in _KINDS:
            if isinstance(error, foreign):
                return kind(f"{doing}: {advice}")
        # py-lmdb turns errno values into plain lmdb.Error texts: "path: No space left on device".
        if isinstance(error, lmdb.DiskError) or str(error).endswith(os.strerror(errno.EIO)):
            # LMDB calls a short write an I/O error; it is mostly that of a full file system.
            disk = os.statvfs(self._path)
            if disk.f_bavail * disk.f_frsize < _ROOM:
                return from_os_error(OSError(errno.ENOSPC, ""), doing)
        if "already open in this process" in str(error):
            return FailedPrecondition(f"{doing}: open in this process; share one engine instead")
        for number in _ERRNOS:
            if str(error).endswith(os.strerror(number)):
                return from_os_error(OSError(number, os.strerror(number)), doing)
        return EngineError(f"{doing}: {error}")


# ENOENT ENOSPC EDQUOT EACCES EPERM EROFS EIO ENOMEM EMFILE ENFILE
_ERRNOS = (2, 28, 122, 13, 1, 30, 5, 12, 24, 23)
