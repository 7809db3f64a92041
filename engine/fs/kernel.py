"""Linux system calls that Python's os module lacks.

Sync; safe from any thread. Numbers are those of asm-generic, the same on every architecture that
Linux gained since 2011; x86-64 shares them from 424 up.
"""

import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "BENEATH",
    "IN_ROOT",
    "LINK_FREE",
    "NO_SYMLINKS",
    "ProjectQuota",
    "adopt_orphans",
    "enforces_project_quotas",
    "ioctl_ficlone",
    "limit_project",
    "open_beneath",
    "project_of",
    "project_quota",
    "punch_hole",
    "put_in_project",
    "release_mapped",
    "syncfs",
    "syscall",
]

_libc = ctypes.CDLL(None, use_errno=True)
_OPENAT2 = 437
_FICLONE = 0x40049409
_MADV_DONTNEED = 4
_PR_SET_CHILD_SUBREAPER = 36
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_QUOTACTL_FD = 443
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FS_XFLAG_PROJINHERIT = 0x200
_PRJQUOTA = 2
_Q_GETQUOTA, _Q_SETQUOTA, _Q_XGETQSTAT = 0x800007, 0x800008, 0x5805
_QIF_BLIMITS, _QIF_ILIMITS = 0x1, 0x4
_QUOTA_BLOCK = 1024  # the unit of limits, whatever the file system (quotactl(2))
_FS_QUOTA_PDQ_ENFD = 1 << 5

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10
BENEATH = _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
NO_SYMLINKS = BENEATH | _RESOLVE_NO_SYMLINKS
LINK_FREE = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS
IN_ROOT = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV

_PATH_LIMIT = 4000  # PATH_MAX is 4096 with its NUL
_TRIES = 100


class _OpenHow(ctypes.Structure):
    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    ]


class _FsXattr(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("xflags", "extsize", "nextents", "projid", "cowextsize")),
        ("pad", ctypes.c_char * 8),
    ]


class _DiskQuota(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in ("bhard", "bsoft", "space", "ihard", "isoft", "inodes", "btime", "itime")
        ),
        ("valid", ctypes.c_uint32),
    ]


class _QuotaState(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int8), ("flags", ctypes.c_uint16), ("more", ctypes.c_char * 124)]


class ProjectQuota(NamedTuple):
    """What a project of a file system has in bytes and inodes, and may have at most; 0 for any."""

    size: int
    inodes: int
    most_size: int
    most_inodes: int


def syscall(number: int, *args: object) -> int:
    """Make a system call and return its result; OSError if it fails."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def open_beneath(folder: int, path: bytes, flags: int, resolve: int = NO_SYMLINKS) -> int:
    """Open `path` below the descriptor `folder`: through no symlink and across no mount.

    With `resolve` BENEATH through symlinks that stay below the folder; with IN_ROOT through any: the
    folder is their `/`; with LINK_FREE through none, but across mounts. A path of any length will do,
    but with IN_ROOT.
    Raises OSError: ELOOP for a symlink on the way, EXDEV for a mount or a way out.
    """
    opened = -1
    try:
        for step, last in _steps(path):
            how = _OpenHow(
                flags=(flags if last else os.O_PATH | os.O_DIRECTORY) | os.O_CLOEXEC,
                resolve=resolve,
            )
            below = _open(folder if opened < 0 else opened, step, how)
            if opened >= 0:
                os.close(opened)
            opened = below
    except BaseException:
        if opened >= 0:
            os.close(opened)
        raise
    return opened


def _open(folder: int, path: bytes, how: _OpenHow) -> int:
    for _ in range(_TRIES):
        try:
            return syscall(_OPENAT2, ctypes.c_int(folder), path, ctypes.byref(how), ctypes.c_size_t(24))
        except BlockingIOError:
            # A rename anywhere while `..` was followed: try again (openat2(2), EAGAIN).
            continue
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def _steps(path: bytes) -> list[tuple[bytes, bool]]:
    """Cut a path into pieces that the kernel takes; say of each whether it is the last."""
    pieces: list[bytes] = []
    while len(path) > _PATH_LIMIT:
        cut = path.rfind(b"/", 0, _PATH_LIMIT)
        if cut < 0:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        pieces.append(path[:cut])
        path = path[cut + 1 :]
    pieces.append(path or b".")
    return [(piece, position == len(pieces) - 1) for position, piece in enumerate(pieces)]


def adopt_orphans() -> None:
    """Be the parent of all processes below this one whose own parent ends (prctl(2))."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def syncfs(folder: int) -> None:
    """Return when everything written to the file system of `folder` is durable."""
    if _libc.syncfs(ctypes.c_int(folder)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def release_mapped(file: Path) -> None:
    """Take the pages of a file that this process maps out of its memory.

    They stay in the kernel's cache and come back when touched: without this, reading a large file
    through a map counts as memory of the process (MADV_DONTNEED on a shared map, madvise(2)).
    """
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(f" {file}"):
            start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def punch_hole(file: int, start: int, length: int) -> None:
    """Give a part of a file back to the file system; it reads as zeros, the size stays (fallocate(2)).

    Raises OSError, EOPNOTSUPP where files have no holes.
    """
    mode = ctypes.c_int(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE)
    at, size = ctypes.c_int64(start), ctypes.c_int64(length)
    while _libc.fallocate64(ctypes.c_int(file), mode, at, size) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def ioctl_ficlone(target: int, source: int) -> None:
    """Make file `target` share the bytes of `source` (reflink); OSError where it cannot."""
    if _libc.ioctl(ctypes.c_int(target), ctypes.c_ulong(_FICLONE), ctypes.c_int(source)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# -- projects of a file system (ext4(5), xfs_quota(8)) ------------------------------------------


def project_of(file: int) -> int:
    """Return the project that an open file or folder counts for, 0 if none.

    Raises OSError, ENOTTY or EOPNOTSUPP, where the file system has no projects.
    """
    return int(_attributes(file).projid)


def put_in_project(file: int, project: int) -> None:
    """Have an open file count for a project; a folder with all that is made in it from then on.

    0 is none. Raises OSError.
    """
    found = _attributes(file)
    found.projid = project
    if stat.S_ISDIR(os.fstat(file).st_mode):
        found.xflags = found.xflags & ~_FS_XFLAG_PROJINHERIT | bool(project) * _FS_XFLAG_PROJINHERIT
    _ioctl(file, _FS_IOC_FSSETXATTR, found)


def _attributes(file: int) -> _FsXattr:
    found = _FsXattr()
    _ioctl(file, _FS_IOC_FSGETXATTR, found)
    return found


def _ioctl(file: int, request: int, argument: ctypes.Structure) -> None:
    if _libc.ioctl(ctypes.c_int(file), ctypes.c_ulong(request), ctypes.byref(argument)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def enforces_project_quotas(file: int) -> bool:
    """Say whether the file system of an open file holds projects to their limits. Raises OSError."""
    state = _QuotaState()
    _quotactl(file, _Q_XGETQSTAT, 0, state)
    return bool(state.flags & _FS_QUOTA_PDQ_ENFD)


def project_quota(file: int, project: int) -> ProjectQuota:
    """Return what a project has on the file system of an open file. Raises OSError."""
    found = _DiskQuota()
    try:
        _quotactl(file, _Q_GETQUOTA, project, found)
    except FileNotFoundError:
        pass  # of a project that never had anything xfs knows nothing
    return ProjectQuota(found.space, found.inodes, found.bhard * _QUOTA_BLOCK, found.ihard)


def limit_project(file: int, project: int, size: int, inodes: int) -> None:
    """Set how much a project may have on the file system of an open file. Raises OSError."""
    wanted = _DiskQuota(bhard=-(-size // _QUOTA_BLOCK), ihard=inodes, valid=_QIF_BLIMITS | _QIF_ILIMITS)
    _quotactl(file, _Q_SETQUOTA, project, wanted)


def _quotactl(file: int, command: int, project: int, argument: ctypes.Structure) -> None:
    whole = ctypes.c_uint(command << 8 | _PRJQUOTA)
    number, place = ctypes.c_uint(project), ctypes.byref(argument)
    try:
        syscall(_QUOTACTL_FD, ctypes.c_int(file), whole, number, place)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # Linux before 5.14; or a file system without quotas, which that says, too.
        device = os.fstat(file).st_dev
        block = f"/dev/block/{os.major(device)}:{os.minor(device)}".encode()
        if _libc.quotactl(whole, block, number, place) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code)) from None
