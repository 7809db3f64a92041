"""Fills a layer's folder from below: whatever the parent has and the layer does not hide is copied in.

Sync. So the copy backend applies layers as the others do, to an empty folder and in any order, and
the rules of how layers combine are decided here, once, against the finished parent.
"""

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Collection

from engine.diff.notes import Notes
from engine.fs.attributes import beneath, copy_attributes, keeping_time
from engine.fs.kernel import ioctl_ficlone

__all__ = ["copy_tree", "fill"]

_COPY_AT_ONCE = 1 << 30
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(parent: int, target: int) -> None:
    """Copy all of the directory `parent` into the empty directory `target`, itself included."""
    _Filling(parent, target, Notes(whiteouts=[], opaque=[], implied=[b""], size=0, inodes=0)).run()


def fill(parent: int, layer: int, notes: Notes) -> None:
    """Complete the layer at descriptor `layer` with what shows of `parent`.

    May be called again on a layer that was filled before, but not on one that was filled in part.
    """
    _Filling(parent, layer, notes).run()


class _Filling:
    def __init__(self, parent: int, layer: int, notes: Notes) -> None:
        self._parent = parent
        self._layer = layer
        self._hidden: defaultdict[bytes, set[bytes]] = defaultdict(set)
        for path, name in notes.whiteouts:
            self._hidden[path].add(name)
        self._opaque = set(notes.opaque)
        self._implied = set(notes.implied)
        self._links: dict[int, bytes] = {}  # inode of the parent's file to its path in the layer

    def run(self) -> None:
        pending = [b""]
        while pending:
            pending += self._fill_folder(pending.pop())
        for path in self._implied:
            try:
                with beneath(self._parent, path) as source, beneath(self._layer, path) as target:
                    copy_attributes(source, target)
            except (FileNotFoundError, NotADirectoryError):
                continue  # the parent has no such folder
            except OSError as error:
                if error.errno != errno.ELOOP:  # it has a link there
                    raise

    def _fill_folder(self, path: bytes) -> list[bytes]:
        """Fill one folder that both sides have; return those below it that both have."""
        if path in self._opaque:
            return []
        hidden: Collection[bytes] = self._hidden.get(path, ())
        both: list[bytes] = []
        with beneath(self._parent, path) as source, beneath(self._layer, path) as target:
            own = {os.fsencode(name) for name in os.listdir(target)}
            with keeping_time(target):
                for name in sorted(map(os.fsencode, os.listdir(source))):
                    below = os.path.join(path, name)
                    if name in hidden:
                        continue
                    if name not in own:
                        if self._copy(source, target, name, below):
                            both.append(below)
                            self._implied.add(below)
                    elif _is_folder(source, name) and _is_folder(target, name):
                        both.append(below)
        return both

    def _copy(self, source: int, target: int, name: bytes, path: bytes) -> bool:
        """Copy one entry; say whether it is a folder, which is then still empty."""
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            return True
        if info.st_nlink > 1:
            first = self._links.setdefault(info.st_ino, path)
            if first != path and self._link(first, target, name):
                return False
        if stat.S_ISREG(info.st_mode):
            _copy_file(source, target, name)
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

    def _link(self, first: bytes, target: int, name: bytes) -> bool:
        """Link to the copy made of the same file before; False at the limit of links."""
        folder, _, last = first.rpartition(b"/")
        try:
            with beneath(self._layer, folder) as holder:
                os.link(last, name, src_dir_fd=holder, dst_dir_fd=target, follow_symlinks=False)
        except OSError:
            return False
        return True


def _is_folder(folder: int, name: bytes) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _copy_file(source: int, target: int, name: bytes) -> None:
    old = os.open(name, _READ, dir_fd=source)
    try:
        new = os.open(name, _NEW, 0o600, dir_fd=target)
        try:
            _copy_bytes(old, new)
            copy_attributes(old, new)
        finally:
            os.close(new)
    finally:
        os.close(old)


def _copy_bytes(old: int, new: int) -> None:
    size = os.fstat(old).st_size
    if not size:
        return
    try:
        ioctl_ficlone(new, old)
    except OSError:
        _copy_extents(old, new, size)


def _copy_extents(old: int, new: int, size: int) -> None:
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
            copied = os.copy_file_range(old, new, min(at - start, _COPY_AT_ONCE))
            if not copied:
                break
            start += copied
    os.ftruncate(new, size)
