"""Reads a tree into values that can be compared: everything that a layer decides, nothing else.

Sync. The root itself is left out, as no layer sets it, and so are overlay's own xattrs, which belong to
a mount.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TreeEntry", "describe", "differences", "read_tree"]


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One entry: `detail` is a file's hash, a link's target or a device's numbers."""

    mode: int
    owner: tuple[int, int]
    size: int
    mtime: int
    detail: str
    links: tuple[bytes, ...]
    """The other names of the same file, all within the tree."""
    xattrs: tuple[tuple[str, bytes], ...]


def read_tree(root: Path) -> dict[bytes, TreeEntry]:
    """Return the entries below `root` by relative path."""
    top = os.fsencode(root)
    found: dict[bytes, tuple[bytes, os.stat_result]] = {}
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, top)] = (path, os.lstat(path))
    return describe(found)


def describe(found: Mapping[bytes, tuple[bytes, os.stat_result]]) -> dict[bytes, TreeEntry]:
    """Return the entries of a tree whose relative paths lead to these files."""
    groups: dict[tuple[int, int], list[bytes]] = {}
    for relative, (_, info) in found.items():
        if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
            groups.setdefault((info.st_dev, info.st_ino), []).append(relative)
    return {
        relative: _entry(path, info, groups.get((info.st_dev, info.st_ino), []), relative)
        for relative, (path, info) in sorted(found.items())
    }


def _entry(path: bytes, info: os.stat_result, group: list[bytes], relative: bytes) -> TreeEntry:
    is_file = stat.S_ISREG(info.st_mode)
    xattrs = (
        (key, os.getxattr(path, key, follow_symlinks=False))
        for key in sorted(os.listxattr(path, follow_symlinks=False))
        if not key.startswith(("trusted.overlay.", "trusted.SGI_ACL_"))  # XFS's own names of ACLs
    )
    return TreeEntry(
        mode=info.st_mode,
        owner=(info.st_uid, info.st_gid),
        size=info.st_size if is_file else 0,
        mtime=info.st_mtime_ns,
        detail=_detail(path, info),
        links=tuple(sorted(name for name in group if name != relative)),
        xattrs=tuple(xattrs),
    )


def _detail(path: bytes, info: os.stat_result) -> str:
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if stat.S_ISLNK(info.st_mode):
        return repr(os.readlink(path))
    if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    return ""


def differences(
    one: dict[bytes, TreeEntry], other: dict[bytes, TreeEntry], *, limit: int = 20
) -> list[str]:
    """Return a line for each entry in which two trees differ, the first few."""
    lines = [
        f"{name!r}: {one.get(name)} / {other.get(name)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
    return lines[:limit]
