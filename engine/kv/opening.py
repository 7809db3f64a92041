"""Opens an LMDB file so that nothing can surprise it later: space first, then a map that fits.

Sync.
"""

import errno
import fcntl
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import lmdb

from engine.errors import NotFound
from engine.fs.durable import flush

__all__ = [
    "HEADROOM",
    "READERS",
    "UNFINISHED",
    "allocate_lock",
    "is_there",
    "is_unmade",
    "make_file",
    "open_file",
]

UNFINISHED = "data.new"  # a copy that is to take the place of the file

READERS = 1024  # slots of readers over all processes; LMDB's default of 126 is few for a daemon
HEADROOM = 64 << 20  # of the map; a write transaction stays under 16 MiB

# mdb.c, mdb_env_setup_locks: MDB_txninfo holds the first of the readers, each a cache line.
_LOCK_BYTES = 192 + 64 * (READERS - 1)
_GET_FLAGS, _SET_FLAGS, _NOCOW = 0x80086601, 0x40086602, 0x00800000  # linux/fs.h
_PAGES = 2 * os.sysconf("SC_PAGE_SIZE")  # what a file without a single record has


def allocate_lock(folder: Path, *, readonly: bool) -> None:
    """Give the file of readers its space: LMDB maps it sparse, and a full disk would be a SIGBUS.

    Must not be called while this process has the LMDB file open: closing any descriptor of that file
    would drop LMDB's locks on it (fcntl(2)).
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock = os.open(folder / "lock.mdb", flags, 0o600)
    except OSError as error:
        if readonly and error.errno in {errno.EROFS, errno.EACCES, errno.ENOENT}:
            return  # LMDB does without it on a read-only file system, or says what is wrong
        raise
    try:
        info = os.fstat(lock)
        if not info.st_size:
            _keep_in_place(lock)
        if info.st_blocks * 512 < _LOCK_BYTES:
            os.posix_fallocate(lock, 0, _LOCK_BYTES)
    finally:
        os.close(lock)


def _keep_in_place(file: int) -> None:
    """Let a new file's blocks be written where they are: else btrfs takes new ones for each write."""
    with suppress(OSError):  # of other file systems, which write in place anyway
        flags = bytearray(8)
        fcntl.ioctl(file, _GET_FLAGS, flags)
        fcntl.ioctl(file, _SET_FLAGS, struct.pack("l", struct.unpack("l", flags)[0] | _NOCOW))


def is_there(folder: Path) -> bool:
    """Say whether there is a file in `folder` that was ever complete."""
    data = folder / "data.mdb"
    return data.exists() and data.stat().st_size >= _PAGES


def is_unmade(folder: Path) -> bool:
    """Say whether there is something for `make_file` to do."""
    return not is_there(folder) or (folder / UNFINISHED).exists()


def make_file(folder: Path) -> None:
    """Make the file in `folder` if there is none; remove what a crash left of it, or of a copy.

    LMDB writes the first two pages and flushes them with the first commit: a power cut before that
    would leave a file that nothing can open, so it gets its name when they are durable.
    """
    data = folder / "data.mdb"
    (folder / UNFINISHED).unlink(missing_ok=True)
    if is_there(folder):
        return
    # In a folder of its own: LMDB notes in the file if it is opened by its name (MDB_NOSUBDIR).
    making = folder / "making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(mode=0o700)
    lmdb.open(os.fspath(making), lock=False, map_size=_PAGES, mode=0o600, lib_version=0).close()
    file = os.open(making / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
    try:
        flush(file)
    finally:
        os.close(file)
    (making / "data.mdb").replace(data)
    making.rmdir()


def open_file(folder: Path, *, map_bytes: int, tables: int, readonly: bool) -> lmdb.Environment:
    """Open the file in `folder`, mapped with `map_bytes` or with what address space there is."""
    try:
        size = (folder / "data.mdb").stat().st_size
    except FileNotFoundError:
        size = 0
    if readonly and size < _PAGES:
        raise NotFound(f"store {folder}: there is nothing in it yet")
    for wanted in (map_bytes, 2 * (size + HEADROOM), size + HEADROOM):
        try:
            return _open(folder, min(wanted, map_bytes), tables, readonly=readonly)
        except lmdb.MemoryError:
            continue
    return _open(folder, size or _PAGES, tables, readonly=readonly)  # enough to read


def _open(folder: Path, map_bytes: int, tables: int, *, readonly: bool) -> lmdb.Environment:
    return lmdb.open(
        os.fspath(folder),
        map_size=map_bytes,
        max_dbs=tables,
        max_readers=READERS,
        mode=0o600,
        create=False,
        readonly=readonly,
        lib_version=0,
    )
