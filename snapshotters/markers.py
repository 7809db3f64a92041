"""How a layer's folder says "hidden below": overlay's devices and xattrs, or aufs's names.

Sync. Everything by descriptor and name.
"""

import os
import stat
from typing import Protocol

__all__ = ["AufsMarkers", "Markers", "OverlayMarkers"]

_OPAQUE_XATTR = "trusted.overlay.opaque"
_WHITEOUT_PREFIX = b".wh."
_OPAQUE_NAME = b".wh..wh..opq"


class Markers(Protocol):
    """The two markers of a union file system."""

    files_hide_folders: bool
    """Whether a file in one layer hides a folder of the same name two layers down even when the
    layer between them has a folder again."""

    def is_whiteout(self, folder: int, name: bytes) -> bool:
        """Say whether `folder` hides `name` of the layers below, and shows nothing itself."""

    def is_opaque(self, folder: int) -> bool:
        """Say whether `folder` hides all that the layers below have in it."""

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Hide `name` of the layers below."""

    def make_opaque(self, folder: int) -> None:
        """Hide all that the layers below have in `folder`."""


class OverlayMarkers:
    """Character devices 0:0 and an xattr (Documentation/filesystems/overlayfs.rst)."""

    files_hide_folders = True

    def is_whiteout(self, folder: int, name: bytes) -> bool:
        """Say whether `name` is a device 0:0."""
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0

    def is_opaque(self, folder: int) -> bool:
        """Say whether the xattr is set."""
        try:
            return os.getxattr(folder, _OPAQUE_XATTR) == b"y"
        except OSError:
            return False

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Make a device 0:0."""
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)

    def make_opaque(self, folder: int) -> None:
        """Set the xattr."""
        os.setxattr(folder, _OPAQUE_XATTR, b"y")


class AufsMarkers:
    """Empty files: `.wh.name`, and `.wh..wh..opq` within the folder (aufs(5))."""

    files_hide_folders = False

    def is_whiteout(self, folder: int, name: bytes) -> bool:
        """Say whether `.wh.name` is there, or `name` is itself a marker."""
        return name.startswith(_WHITEOUT_PREFIX) or _exists(folder, _WHITEOUT_PREFIX + name)

    def is_opaque(self, folder: int) -> bool:
        """Say whether `.wh..wh..opq` is there."""
        return _exists(folder, _OPAQUE_NAME)

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Make `.wh.name`."""
        _touch(folder, _WHITEOUT_PREFIX + name)

    def make_opaque(self, folder: int) -> None:
        """Make `.wh..wh..opq`."""
        if not self.is_opaque(folder):
            _touch(folder, _OPAQUE_NAME)


def _exists(folder: int, name: bytes) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _touch(folder: int, name: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    marker = os.open(name, flags, 0o444, dir_fd=folder)
    try:
        os.fchmod(marker, 0o444)  # whatever the umask of the process is
    finally:
        os.close(marker)
