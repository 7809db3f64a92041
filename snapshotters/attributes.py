"""Attributes of open files and folders as values: read from one layer, given to another. Sync."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from engine.diff import acl
from engine.diff.layer import Attributes
from engine.errors import Refused, printable

__all__ = ["changing", "give_attributes", "give_owner", "read_attributes"]

_ROOM_BLOCKS = 1024  # free blocks with which "no space" cannot mean the disk
# Overlay's belong to a layer, not to a tree; XFS's are ACLs, which it lists under two names.
_NOT_OF_A_TREE = ("trusted.overlay.", "trusted.SGI_ACL_")

Xattrs = tuple[tuple[bytes, bytes], ...]


def read_attributes(fd: int) -> Attributes:
    """Return what an open file or folder has."""
    info = os.fstat(fd)
    xattrs = tuple(
        (os.fsencode(key), os.getxattr(fd, key))
        for key in os.listxattr(fd)
        if not key.startswith(_NOT_OF_A_TREE)
    )
    mode = stat.S_IMODE(info.st_mode)
    return Attributes(mode, info.st_uid, info.st_gid, info.st_mtime_ns, xattrs)


def give_attributes(fd: int, attributes: Attributes, name: bytes) -> int:
    """Give an open file or folder its attributes, as `give_owner`; `name` is for messages."""
    mode, uid, gid, mtime, xattrs = attributes
    left_out = give_owner(fd, mode, uid, gid, xattrs, name)
    os.utime(fd, ns=(mtime, mtime))
    return left_out


def give_owner(fd: int, mode: int, uid: int, gid: int, xattrs: Xattrs, name: bytes) -> int:
    """Give owner, xattrs and mode: in this order, as each undoes parts of the next.

    Return how many ACLs the file system does not take. Raises Refused for xattrs that do not fit in it.
    """
    left_out = 0
    if uid or gid:
        os.fchown(fd, uid, gid)
    for key, value in xattrs:
        left_out += not _set_xattr(fd, key, value, name)
    os.fchmod(fd, mode)
    return left_out


def _set_xattr(fd: int, key: bytes, value: bytes, name: bytes) -> bool:
    try:
        os.setxattr(fd, key, value)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and key in {acl.ACCESS, acl.DEFAULT}:
            return False
        # ext4 says "no space" of an xattr that is too large for it, also on an empty disk.
        room = os.fstatvfs(fd).f_bavail
        if error.errno == errno.E2BIG or (error.errno == errno.ENOSPC and room > _ROOM_BLOCKS):
            raise Refused(
                f"xattrs of {printable(name)!r} do not fit in this file system; use another --root"
            ) from None
        raise
    return True


@contextmanager
def changing(folder: int) -> Iterator[None]:
    """Let a block make names in a directory that inherit nothing from it; its times stay."""
    before = os.fstat(folder)
    default = _default_acl(folder)
    if default:
        os.removexattr(folder, acl.DEFAULT)
    if before.st_mode & stat.S_ISGID:
        os.fchmod(folder, stat.S_IMODE(before.st_mode) & ~stat.S_ISGID)
    try:
        yield
    finally:
        if default:
            os.setxattr(folder, acl.DEFAULT, default)
        if before.st_mode & stat.S_ISGID:
            os.fchmod(folder, stat.S_IMODE(before.st_mode))
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _default_acl(folder: int) -> bytes:
    try:
        return os.getxattr(folder, acl.DEFAULT)
    except OSError:  # there is none, as nearly always, or none can be
        return b""
