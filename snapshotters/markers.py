"""How a layer's folder says "hidden below": overlay's devices and xattrs, or aufs's names.

Sync. Everything by descriptor and name.
"""

import os
import stat
from dataclasses import dataclass
from typing import Protocol

__all__ = ["AufsMarkers", "Listing", "Markers", "OverlayMarkers"]

_OPAQUE_XATTR = "trusted.overlay.opaque"
_WHITEOUT_PREFIX = b".wh."
_OPAQUE_NAME = b".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class Listing:
    """What one layer has in one folder, its markers told apart."""

    names: dict[bytes, bool]
    """Names, and whether each is a folder."""
    whiteouts: set[bytes]
    is_opaque: bool


class Markers(Protocol):
    """The two markers of a union file system."""

    lowest_opaque_counts: bool
    """Whether of two opaque marks at one path in a chain the lower one is what counts, and a folder
    goes on below what is none: then what is buried below matters too."""

    def read(self, folder: int) -> Listing:
        """Return what a layer's folder has."""

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Hide `name` of the layers below."""

    def make_opaque(self, folder: int) -> int:
        """Hide all that the layers below have in `folder`; return how many inodes that takes."""


class OverlayMarkers:
    """Character devices 0:0 and an xattr (Documentation/filesystems/overlayfs.rst)."""

    lowest_opaque_counts = False

    def read(self, folder: int) -> Listing:
        """Return what a layer's folder has."""
        names: dict[bytes, bool] = {}
        whiteouts: set[bytes] = set()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                is_folder = entry.is_dir(follow_symlinks=False)
                if not (is_folder or entry.is_file(follow_symlinks=False)) and _is_device_0(entry):
                    whiteouts.add(name)
                else:
                    names[name] = is_folder
        try:
            is_opaque = os.getxattr(folder, _OPAQUE_XATTR) == b"y"
        except OSError:
            is_opaque = False
        return Listing(names, whiteouts, is_opaque)

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Make a device 0:0."""
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)

    def make_opaque(self, folder: int) -> int:
        """Set the xattr."""
        os.setxattr(folder, _OPAQUE_XATTR, b"y")
        return 0


def _is_device_0(entry: "os.DirEntry[str]") -> bool:
    if entry.is_symlink():
        return False
    info = entry.stat(follow_symlinks=False)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


class AufsMarkers:
    """Empty files: `.wh.name`, and `.wh..wh..opq` within the folder (aufs(5))."""

    # Seen on a real kernel (6.1): what an upper opaque mark hid shows again above a lower one.
    lowest_opaque_counts = True

    def read(self, folder: int) -> Listing:
        """Return what a layer's folder has."""
        with os.scandir(folder) as entries:
            found = {os.fsencode(entry.name): entry.is_dir(follow_symlinks=False) for entry in entries}
        marks = {name for name in found if name.startswith(_WHITEOUT_PREFIX)}
        whiteouts = {name[len(_WHITEOUT_PREFIX) :] for name in marks - {_OPAQUE_NAME}}
        names = {
            name: is_folder
            for name, is_folder in found.items()
            if name not in marks and name not in whiteouts
        }
        return Listing(names, whiteouts, _OPAQUE_NAME in marks)

    def make_whiteout(self, folder: int, name: bytes) -> None:
        """Make `.wh.name`."""
        _touch(folder, _WHITEOUT_PREFIX + name)

    def make_opaque(self, folder: int) -> int:
        """Make `.wh..wh..opq`."""
        _touch(folder, _OPAQUE_NAME)
        return 1


def _touch(folder: int, name: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    marker = os.open(name, flags, 0o444, dir_fd=folder)
    try:
        os.fchmod(marker, 0o444)  # whatever the umask of the process is
    finally:
        os.close(marker)
