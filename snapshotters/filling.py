"""Fills a layer's folder from below: whatever the parent has and the layer does not hide is copied in.

Sync; one thread. So the copy backend applies layers as the others do, to an empty folder and in any
order, and the rules of how layers combine are decided here, once, against the finished parent. Both
trees are walked once, side by side.
"""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from engine.diff.layer import Folder, Place, path_of
from engine.fs.attributes import beneath
from engine.fs.kernel import ioctl_ficlone
from engine.fs.room import Room
from engine.snapshots import Usage
from snapshotters.attributes import changing, give_attributes, read_attributes
from snapshotters.descriptors import OpenFolders

__all__ = ["Copying", "fill"]

_COPY_AT_ONCE = 1 << 24
_BLOCK = 512  # the unit of st_blocks, whatever the file system (stat(2))
_LEAST = 4096  # what an entry takes on the file systems that people use; the bytes of a file come beside
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """A folder that both trees have; `own` is the layer's, None for one that was copied in."""

    above: "_Place | None"
    name: bytes
    depth: int
    own: Folder | None
    is_covered: bool = False
    """Whether the layer hides all that the parent has in it."""

    @property
    def parent(self) -> "_Place":
        return self.above or self


def fill(parent: int, layer: int, root: Folder | None, room: Room) -> Usage:
    """Complete the tree at descriptor `layer` with what shows of `parent`; return what came in.

    `root` is the layer's tree; without one all is copied, attributes of the root included. May be
    called again on a layer that was filled before, but not on one that was filled in part.
    """
    with OpenFolders(parent) as sources, OpenFolders(layer) as targets:
        copying = Copying(layer, room)
        filling = _Filling(sources, targets, copying)
        pending = [_Place(None, b"", 0, root, is_covered=root is not None and root.is_opaque)]
        while pending:
            pending += filling.fill(pending.pop())
        return Usage(copying.size, copying.inodes)


class _Filling:
    def __init__(self, sources: OpenFolders, targets: OpenFolders, copying: "Copying") -> None:
        self._sources = sources
        self._targets = targets
        self._copying = copying

    def fill(self, place: _Place) -> list[_Place]:
        """Fill one folder that both sides have; return those below it that both have then."""
        self._sources.trim()
        self._targets.trim()
        source, target = self._sources.get(place), self._targets.get(place)
        with changing(target):
            both = list(self._fill_names(place, source, target))
        if place.own is None or (place.own.attributes is None and place.depth):
            give_attributes(target, read_attributes(source), place.name)
        return both

    def _fill_names(self, place: _Place, source: int, target: int) -> Iterator[_Place]:
        layer = place.own
        for name in sorted(map(os.fsencode, os.listdir(source))):
            own = layer.names.get(name) if layer else None
            if isinstance(own, Folder):
                if _is_folder(source, name):
                    covered = place.is_covered or own.is_opaque
                    yield _Place(place, name, place.depth + 1, own, covered)
            elif own is not None or place.is_covered or (layer and name in layer.hidden):
                continue
            elif self._copying.copy(source, target, place, name):
                yield _Place(place, name, place.depth + 1, None)


class Copying:
    """Copies entries of one tree to the same places below the directory `top` is a descriptor of.

    What shared an inode does so again.
    """

    def __init__(self, top: int, room: Room) -> None:
        self._top = top
        self._room = room
        self._links: dict[int, tuple[Place, bytes]] = {}  # inode of the one to its copy
        self.size = 0
        self.inodes = 0

    def copy(self, source: int, target: int, place: Place, name: bytes) -> bool:
        """Copy one entry of the folder `place`; say whether it is a folder, which is empty then."""
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            first = self._links.setdefault(info.st_ino, (place, name))
            if first != (place, name) and self._link(first, target, name):
                return False
        self.size += info.st_blocks * _BLOCK
        self.inodes += 1
        self._room.take(_LEAST)
        if stat.S_ISDIR(info.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            return True
        if stat.S_ISREG(info.st_mode):
            self._copy_file(source, target, name)
            return False
        if stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, info.st_mode, info.st_rdev, dir_fd=target)
        os.chown(name, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
        if not stat.S_ISLNK(info.st_mode):
            # Without following: this process made the node a moment ago in a folder of its own.
            os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=target)
        times = (info.st_atime_ns, info.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)
        return False

    def _copy_file(self, source: int, target: int, name: bytes) -> None:
        old = os.open(name, _READ, dir_fd=source)
        try:
            new = os.open(name, _NEW, 0o600, dir_fd=target)
            try:
                _copy_bytes(old, new, self._room)
                give_attributes(new, read_attributes(old), name)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _link(self, first: tuple[Place, bytes], target: int, name: bytes) -> bool:
        """Link to the copy made of the same file before; False at the limit of links."""
        holder, last = first
        try:
            with beneath(self._top, path_of(holder)) as folder:
                os.link(last, name, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)
        except OSError:
            return False
        return True


def _is_folder(folder: int, name: bytes) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _copy_bytes(old: int, new: int, room: Room) -> None:
    size = os.fstat(old).st_size
    if not size:
        return
    try:
        ioctl_ficlone(new, old)
    except OSError:
        _copy_extents(old, new, size, room)


def _copy_extents(old: int, new: int, size: int, room: Room) -> None:
    """Copy what holds data and leave holes as holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(old, at, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: nothing but a hole up to the end
        at = os.lseek(old, start, os.SEEK_HOLE)
        os.lseek(old, start, os.SEEK_SET)
        os.lseek(new, start, os.SEEK_SET)
        while start < at:
            count = min(at - start, _COPY_AT_ONCE)
            room.take(count)
            copied = os.copy_file_range(old, new, count)
            if not copied:  # else zeros would stand for what is missing
                raise OSError(errno.EIO, "a file ended before its size")
            start += copied
    os.ftruncate(new, size)
