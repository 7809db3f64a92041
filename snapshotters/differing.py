"""How what is on disk differs from what a layer says, or from the same entry of another tree.

Sync. By descriptor and name, never through a link, and no access time changes. What says nothing about
a layer is passed over: access times, and the xattrs that a host gives files for its own ends.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping

from engine.diff import acl, tar
from engine.diff.layer import Attributes
from engine.diff.sparse import placed
from engine.diff.tar import Entry
from engine.errors import printable
from snapshotters.attributes import Xattrs

__all__ = [
    "attributes_differ",
    "content_differs",
    "content_of",
    "entry_differs",
    "look",
    "open_file",
    "twins_differ",
]

_AT_ONCE = 1 << 20
_SECOND = 10**9
_LATEST_S = (1 << 31) - 1  # of file systems with small inodes, which keep the latest that they can
_CAPABILITY = b"security.capability"
# A layer decides these. An access right that it never gave is damage, a label of the host's is none.
_DECIDED = (b"user.", b"system.posix_acl_", _CAPABILITY, b"trusted.overlay.")
_MARK = b"trusted.overlay.opaque"  # of folders, which are compared with what they stand on
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_TYPES = {
    tar.FILE: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR_DEVICE: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}


def look(folder: int | None, name: bytes) -> os.stat_result | None:
    """Return what stands at a name, None if nothing does, or the folder itself is not there."""
    if folder is None:
        return None
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_file(folder: int, name: bytes) -> int:
    """Open a regular file to read it, without leaving a trace."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=folder)
    except PermissionError:  # another's file, and no right to pass over that
        return os.open(name, flags, dir_fd=folder)


# -- against what a layer says ----------------------------------------------------------------


def entry_differs(folder: int, name: bytes, info: os.stat_result, entry: Entry) -> list[str]:
    """Say how something on disk differs from an entry that is no folder; contents are left out."""
    kind = stat.S_IFMT(info.st_mode)
    if kind != _TYPES[entry.type]:
        return [f"a {_KINDS.get(kind, 'thing')}, not a {_KINDS[_TYPES[entry.type]]}"]
    found = list(_owner_differs(info, entry.uid, entry.gid))
    found += _time_differs(info.st_mtime_ns, entry.mtime)
    if kind == stat.S_IFLNK:
        text = os.readlink(name, dir_fd=folder)
        if text != entry.link:
            found.append(f"leads to {printable(text)!r}, not to {printable(entry.link)!r}")
        return found
    found += _mode_differs(info, entry.mode)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        found += _device_differs(info.st_rdev, os.makedev(entry.major, entry.minor))
    elif kind == stat.S_IFREG and info.st_size != entry.size:
        found.append(f"size {info.st_size}, not {entry.size}")
    return found


def attributes_differ(opened: int, attributes: Attributes, *, is_folder: bool = True) -> list[str]:
    """Say how an open folder, or the xattrs of an open file, differ from what a layer says."""
    found: list[str] = []
    if is_folder:
        info = os.fstat(opened)
        found += _owner_differs(info, attributes.uid, attributes.gid)
        found += _time_differs(info.st_mtime_ns, attributes.mtime)
        found += _mode_differs(info, attributes.mode)
    return [*found, *_xattrs_differ(opened, attributes.mode, attributes.xattrs, is_folder=is_folder)]


def _owner_differs(info: os.stat_result, uid: int, gid: int) -> Iterator[str]:
    if (info.st_uid, info.st_gid) != (uid, gid):
        yield f"owner {info.st_uid}:{info.st_gid}, not {uid}:{gid}"


def _mode_differs(info: os.stat_result, mode: int) -> Iterator[str]:
    if stat.S_IMODE(info.st_mode) != mode:
        yield f"mode {stat.S_IMODE(info.st_mode):04o}, not {mode:04o}"


def _time_differs(found: int, mtime: int) -> Iterator[str]:
    """Tell of another time than a file system without room for this one would keep."""
    is_rounded = found % _SECOND == 0 and found // _SECOND == mtime // _SECOND
    is_latest = mtime > found >= _LATEST_S * _SECOND
    if found != mtime and not is_rounded and not is_latest:
        yield f"modified at {found / _SECOND}, not {mtime / _SECOND}"


def _device_differs(found: int, device: int) -> Iterator[str]:
    if found != device:
        yield (f"device {os.major(found)}:{os.minor(found)}, not {os.major(device)}:{os.minor(device)}")


def _xattrs_differ(opened: int, mode: int, xattrs: Xattrs, *, is_folder: bool) -> Iterator[str]:
    held = ((key, _as_held(key, value, mode)) for key, value in xattrs if key.startswith(_DECIDED))
    wanted = {key: value for key, value in held if value is not None}
    found = {
        key: os.getxattr(opened, key)
        for key in map(os.fsencode, os.listxattr(opened))
        if key.startswith(_DECIDED) and not (is_folder and key == _MARK)
    }
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) == found.get(key):
            continue
        how = "added" if key not in wanted else "changed" if key in found else "missing"
        if how != "missing" or _is_possible(opened, key):
            yield f"xattr {printable(key)} {how}"


def _as_held(key: bytes, value: bytes, mode: int) -> bytes | None:
    return acl.as_held(key, value, mode) if key in {acl.ACCESS, acl.DEFAULT} else value


def _is_possible(opened: int, key: bytes) -> bool:
    """Say whether the file system could hold a missing xattr: ACLs are left out where it cannot."""
    try:
        os.getxattr(opened, key)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def content_differs(file: int, entry: Entry, pieces: Iterable[memoryview]) -> str:
    """Hold an open file against the content that comes in pieces.

    Return "" if they are equal, else what `content_of` returns of the content, to look for it elsewhere.
    """
    running = None
    behind, end = 0, 0  # bytes of the content, and where in the file its last piece ended
    is_equal = os.fstat(file).st_size == entry.size
    for at, piece in _placed(entry, iter(pieces)):
        is_equal = is_equal and _is_hole(file, end, at)
        is_equal = is_equal and os.pread(file, len(piece), at) == bytes(piece)
        if not is_equal and running is None:
            running = hashlib.sha256()
            _add(running, file, entry, behind)
        if running is not None:
            running.update(piece)
        behind += len(piece)
        end = at + len(piece)
    is_equal = is_equal and _is_hole(file, end, entry.size)
    if not is_equal and running is None:
        running = hashlib.sha256()
        _add(running, file, entry, behind)
    return running.hexdigest() if running else ""


def _placed(entry: Entry, pieces: Iterator[memoryview]) -> Iterator[tuple[int, memoryview]]:
    if entry.parts is not None:
        yield from placed(entry.parts, pieces)
        return
    at = 0
    for piece in pieces:
        yield at, piece
        at += len(piece)


def _is_hole(file: int, at: int, end: int) -> bool:
    """Say whether a file has nothing but zeros from `at` to `end`, a hole or not."""
    while at < end:
        at = min(_next_data(file, at), end)
        if at < end:
            data = os.pread(file, min(_AT_ONCE, end - at), at)
            if data.strip(b"\0"):
                return False
            at += len(data) or end
    return True


def _next_data(file: int, at: int) -> int:
    """Return where a file's next data is, its size if there is none."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(file).st_size


def content_of(file: int, entry: Entry) -> str:
    """Return the sha256 of what an open file has where an entry has data, "" if it has more.

    The file has the size of the entry.
    """
    at = 0
    for start, length in _parts(entry):
        if not _is_hole(file, at, start):
            return ""
        at = start + length
    if not _is_hole(file, at, entry.size):
        return ""
    running = hashlib.sha256()
    _add(running, file, entry, entry.size)
    return running.hexdigest()


def _parts(entry: Entry) -> Iterator[tuple[int, int]]:
    parts = (0, entry.size) if entry.parts is None else entry.parts
    return zip(parts[::2], parts[1::2], strict=True)


def _add(running: "hashlib._Hash", file: int, entry: Entry, count: int) -> None:
    """Add the first `count` bytes of what a file has where an entry has data."""
    for start, length in _parts(entry):
        end = start + min(length, count)
        while start < end and (data := os.pread(file, min(_AT_ONCE, end - start), start)):
            running.update(data)
            start += len(data)
            count -= len(data)


# -- against the same entry of another tree ---------------------------------------------------


def twins_differ(folder: int, name: bytes, other: int, others: bytes) -> list[str]:
    """Say how something differs from what stands elsewhere and should be its like; no folders."""
    mine, theirs = look(folder, name), look(other, others)
    if mine is None or theirs is None:
        return ["one of two that should be alike is missing"]
    kind, wanted = stat.S_IFMT(mine.st_mode), stat.S_IFMT(theirs.st_mode)
    if kind != wanted:
        return [f"a {_KINDS.get(kind, 'thing')}, not a {_KINDS.get(wanted, 'thing')}"]
    found = [*_owner_differs(mine, theirs.st_uid, theirs.st_gid)]
    found += _time_differs(mine.st_mtime_ns, theirs.st_mtime_ns)
    if kind == stat.S_IFLNK:
        if os.readlink(name, dir_fd=folder) != os.readlink(others, dir_fd=other):
            found.append("leads elsewhere")
        return found
    found += _mode_differs(mine, stat.S_IMODE(theirs.st_mode))
    found += _device_differs(mine.st_rdev, theirs.st_rdev)
    if kind == stat.S_IFREG:
        found += _files_differ(folder, name, other, others)
    return found


def _files_differ(folder: int, name: bytes, other: int, others: bytes) -> list[str]:
    mine = open_file(folder, name)
    try:
        theirs = open_file(other, others)
        try:
            mode = stat.S_IMODE(os.fstat(theirs).st_mode)
            wanted = tuple(_decided(theirs).items())
            found = list(_xattrs_differ(mine, mode, wanted, is_folder=False))
            return found if _are_equal(mine, theirs) else [*found, "content"]
        finally:
            os.close(theirs)
    finally:
        os.close(mine)


def _decided(opened: int) -> Mapping[bytes, bytes]:
    names = (os.fsencode(key) for key in os.listxattr(opened))
    return {key: os.getxattr(opened, key) for key in names if key.startswith(_DECIDED)}


def _are_equal(mine: int, theirs: int) -> bool:
    at, size = 0, os.fstat(theirs).st_size
    if os.fstat(mine).st_size != size:
        return False
    while at < size:
        # A file may be said to be of terabytes, and have none.
        at = min(_next_data(mine, at), _next_data(theirs, at))
        wanted = os.pread(theirs, _AT_ONCE, at)
        if os.pread(mine, _AT_ONCE, at) != wanted:
            return False
        at += len(wanted) or size
    return True
