"""What LMDB's errors mean: each becomes an error of the engine that says what to do.

Sync.
"""

import errno
import os
from collections.abc import Iterator
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

__all__ = ["OUTGROWN", "is_of_the_disk", "mapped"]

_ROOM = 32 << 20  # bytes free below which a failed write means that the disk is full

OUTGROWN = "it has outgrown the address space of this process; raise the limit (ulimit -v)"

_KINDS: tuple[tuple[type[Exception], type[EngineError], str], ...] = (
    (lmdb.MapFullError, ResourceExhausted, "the store has reached its largest size"),
    (lmdb.MapResizedError, ResourceExhausted, OUTGROWN),
    (lmdb.MemoryError, ResourceExhausted, "out of memory or address space (ulimit -v)"),
    (lmdb.ReadersFullError, Unavailable, "too many readers; try again"),
    (lmdb.TlsFullError, Unavailable, "too many environments; try again"),
    (lmdb.VersionMismatchError, FailedPrecondition, "written by another LMDB format"),
    (lmdb.InvalidError, DataLoss, "not an LMDB file; restore it from a backup"),
    (lmdb.CorruptedError, DataLoss, "a page is damaged; restore it from a backup"),
    (lmdb.PageNotFoundError, DataLoss, "a page is missing; restore it from a backup"),
    (lmdb.ReadonlyError, PermissionDenied, "opened read-only"),
)

_ERRNOS = (
    *(errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
)


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """Map any error of LMDB's from the block, which works on `path`."""
    try:
        yield
    except lmdb.Error as error:
        raise _from_lmdb(path, error) from error


def _from_lmdb(path: Path, error: lmdb.Error) -> EngineError:
    doing = f"store {path}"
    for foreign, kind, advice in _KINDS:
        if isinstance(error, foreign):
            return kind(f"{doing}: {advice}")
    # py-lmdb turns errno values into plain lmdb.Error texts: "path: No space left on device".
    if is_of_the_disk(error):
        # LMDB calls a short write an I/O error; it is mostly that of a full file system. After one of a
        # meta page nothing can be written until the file is opened again: each attempt is a panic.
        disk = os.statvfs(path)
        if disk.f_bavail * disk.f_frsize < _ROOM:
            return from_os_error(OSError(errno.ENOSPC, ""), doing)
    if isinstance(error, lmdb.PanicError):
        return Unavailable(f"{doing}: an earlier write failed; see to the disk, then run this again")
    if _is(error, errno.EAGAIN):
        # Readers lock the byte of their pid in lock.mdb (mdb.c, mdb_reader_pid).
        return Unavailable(
            f"{doing}: a process of another pid namespace has the same pid ({os.getpid()}) and reads "
            "it; start again, or let both share one pid namespace"
        )
    for number in _ERRNOS:
        if _is(error, number):
            return from_os_error(OSError(number, os.strerror(number)), doing)
    return EngineError(f"{doing}: {error}")


def is_of_the_disk(error: lmdb.Error) -> bool:
    """Say whether a write failed so that nobody knows what of it is durable."""
    return isinstance(error, lmdb.DiskError | lmdb.PanicError) or _is(error, errno.EIO)


def _is(error: lmdb.Error, number: int) -> bool:
    return str(error).endswith(os.strerror(number))
