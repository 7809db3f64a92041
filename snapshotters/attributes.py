"""Attributes of open files and folders as values: read from one layer, given to another. Sync."""

import errno
import os
import stat

from engine.diff.layer import Attributes
from engine.errors import Refused, printable

__all__ = ["give_attributes", "give_owner", "read_attributes"]

_ROOM_BLOCKS = 1024  # free blocks with which "no space" cannot mean the disk

Xattrs = tuple[tuple[bytes, bytes], ...]


def read_attributes(fd: int) -> Attributes:
    """Return what an open file or folder has. Overlay's own xattrs belong to a layer, not to a tree."""
    info = os.fstat(fd)
    xattrs = tuple(
        (os.fsencode(key), os.getxattr(fd, key))
        for key in os.listxattr(fd)
        if not key.startswith("trusted.overlay.")
    )
    mode = stat.S_IMODE(info.st_mode)
    return Attributes(mode, info.st_uid, info.st_gid, info.st_mtime_ns, xattrs)


def give_attributes(fd: int, attributes: Attributes, name: bytes) -> None:
    """Give an open file or folder its attributes; `name` is for messages."""
    mode, uid, gid, mtime, xattrs = attributes
    give_owner(fd, mode, uid, gid, xattrs, name)
    os.utime(fd, ns=(mtime, mtime))


def give_owner(fd: int, mode: int, uid: int, gid: int, xattrs: Xattrs, name: bytes) -> None:
    """Give owner, xattrs and mode: in this order, as each undoes parts of the next.

    Raises Refused for xattrs that the file system cannot hold.
    """
    if uid or gid:
        os.fchown(fd, uid, gid)
    for key, value in xattrs:
        _set_xattr(fd, key, value, name)
    os.fchmod(fd, mode)


def _set_xattr(fd: int, key: bytes, value: bytes, name: bytes) -> None:
    try:
        os.setxattr(fd, key, value)
    except OSError as error:
        # ext4 says "no space" of an xattr that is too large for it, also on an empty disk.
        room = os.fstatvfs(fd).f_bavail
        if error.errno == errno.E2BIG or (error.errno == errno.ENOSPC and room > _ROOM_BLOCKS):
            raise Refused(
                f"xattrs of {printable(name)!r} do not fit in this file system; use another --root"
            ) from None
        raise
