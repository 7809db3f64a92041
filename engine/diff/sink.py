"""Carries a layer's operations out in an empty folder of its own.

Sync; one thread. Because the folder holds nothing but this layer, a link met on the way to a parent
is one of the layer's own, and it is resolved by hand, component by component on descriptors that never
leave the folder. Nothing is opened through a link; everything is made with O_EXCL or its like after
what was there is gone.

The process's umask must be 0. Directories get owner, mode, xattrs and times in `finish`: a setgid bit
would otherwise leak into what is made inside, and every file would undo the time.
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from engine import limits
from engine.diff import tar
from engine.diff.notes import Notes
from engine.diff.rules import Action, Operation, Rules, split_name
from engine.diff.tar import Entry
from engine.errors import Refused, printable
from engine.fs.kernel import open_beneath
from engine.fs.removal import remove_entry
from engine.fs.usage import measure

__all__ = ["FolderSink"]

_OPEN_FOLDERS = 256
_REPLACED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_STEPS = 4096  # folders and links that one entry may make us walk through
_ROOM_BLOCKS = 1024  # free blocks with which "no space" cannot mean the disk
_BLOCK = 4096  # what the smallest file takes on the file systems that people use
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODE_TYPES = {
    tar.CHAR_DEVICE: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}

_ASIDE = b".wh..wh.lamina"  # a name that no layer can have

Payload = Callable[[], Iterator[memoryview]]


class _Folder(NamedTuple):
    """An open directory and its real path below the root, no link in it."""

    fd: int
    path: bytes


class FolderSink:
    """Applies one layer, whose names `rules` checks, to the directory `root` is a descriptor of."""

    def __init__(self, root: int, rules: Rules) -> None:
        self._root = _Folder(root, b"")
        self._rules = rules
        self._open: OrderedDict[bytes, _Folder] = OrderedDict()
        self._passing: list[int] = []  # descriptors that only the current operation may use
        # By inode, which names a directory even after its path got another one (P-13).
        self._directories: dict[int, tuple[bytes, Entry | None]] = {}
        self._whiteouts: dict[int, tuple[bytes, set[bytes]]] = {}  # by inode of the folder, too
        self._opaque: dict[int, bytes] = {}
        self._steps = 0
        self._size = 0
        self._inodes = 0
        self._is_counted = True  # until something is replaced
        self._make: dict[Action, Callable[[_Folder, Operation, Payload], None]] = {
            Action.FILE: self._file,
            Action.DIRECTORY: self._directory,
            Action.SYMLINK: self._symlink,
            Action.HARDLINK: self._hardlink,
            Action.NODE: self._node,
            Action.WHITEOUT: self._whiteout,
            Action.OPAQUE: self._mark_opaque,
        }

    def apply(self, operation: Operation, payload: Payload) -> None:
        """Carry out one operation; `payload` gives the bytes of a file."""
        self._trim()
        self._steps = 0
        parent = self._folder(operation.parent)
        make = self._make[operation.action]
        try:
            make(parent, operation, payload)
        except FileExistsError:
            if operation.action is Action.HARDLINK:
                self._replace_by_link(parent, operation, payload)
            else:
                self._clear(parent, operation.name)
                make(parent, operation, payload)

    def _replace_by_link(self, parent: _Folder, operation: Operation, payload: Payload) -> None:
        """Link first, then clear: the target may be what is in the way, or below it."""
        aside = msgspec.structs.replace(operation, name=_ASIDE)
        self._hardlink(parent, aside, payload)
        self._clear(parent, operation.name)
        os.rename(_ASIDE, operation.name, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)

    # -- the operations -----------------------------------------------------------------------

    def _file(self, parent: _Folder, operation: Operation, payload: Payload) -> None:
        entry = operation.entry
        file = os.open(operation.name, _NEW_FILE, entry.mode, dir_fd=parent.fd)
        try:
            for piece in payload():
                _write_all(file, piece)
            _own(file, entry)
            os.utime(file, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(file)
        self._size += -(-entry.size // _BLOCK) * _BLOCK
        self._inodes += 1

    def _directory(self, parent: _Folder, operation: Operation, _payload: Payload) -> None:
        try:
            made = self._make_directory(parent, operation.name)
        except FileExistsError:
            made = _look(parent.fd, operation.name)
            if not stat.S_ISDIR(made.st_mode):
                raise
        path = _join(parent.path, operation.name)
        self._directories[made.st_ino] = (path, operation.entry)

    def _make_directory(self, parent: _Folder, name: bytes) -> os.stat_result:
        path = _join(parent.path, name)
        self._rules.check_folder(path)
        os.mkdir(name, 0o700, dir_fd=parent.fd)
        self._rules.count_name(path)
        if len(self._directories) >= limits.LAYER_DIRECTORIES:
            raise Refused(f"layer has over {limits.LAYER_DIRECTORIES} folders")
        self._size += _BLOCK
        self._inodes += 1
        made = _look(parent.fd, name)
        # The inode may be that of a folder that is gone, and its markers with it.
        self._whiteouts.pop(made.st_ino, None)
        self._opaque.pop(made.st_ino, None)
        return made

    def _symlink(self, parent: _Folder, operation: Operation, _payload: Payload) -> None:
        entry = operation.entry
        os.symlink(entry.link, operation.name, dir_fd=parent.fd)
        self._finish_node(parent, operation)

    def _node(self, parent: _Folder, operation: Operation, _payload: Payload) -> None:
        entry = operation.entry
        mode = _NODE_TYPES[entry.type] | entry.mode
        os.mknod(operation.name, mode, os.makedev(entry.major, entry.minor), dir_fd=parent.fd)
        self._finish_node(parent, operation)
        if entry.mode & 0o6000 and (entry.uid or entry.gid):
            # chown cleared them. No link can be here: this process has just made the node.
            os.chmod(operation.name, entry.mode, dir_fd=parent.fd)

    def _finish_node(self, parent: _Folder, operation: Operation) -> None:
        entry = operation.entry
        if entry.uid or entry.gid:
            os.chown(operation.name, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)
        os.utime(
            operation.name,
            ns=(entry.mtime, entry.mtime),
            dir_fd=parent.fd,
            follow_symlinks=False,
        )
        self._inodes += 1

    def _hardlink(self, parent: _Folder, operation: Operation, _payload: Payload) -> None:
        holder, name = split_name(operation.target)
        try:
            source = self._existing_folder(holder)
            # A target that is a link is itself linked, never what it points to. Attributes of the
            # entry are ignored: they are those of the target, or an attack on it.
            os.link(
                name,
                operation.name,
                src_dir_fd=source.fd,
                dst_dir_fd=parent.fd,
                follow_symlinks=False,
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise Refused(
                f"hard link {printable(operation.entry.name)!r}: its target "
                f"{printable(operation.target)!r} is no file of the same layer"
            ) from None

    def _whiteout(self, parent: _Folder, operation: Operation, _payload: Payload) -> None:
        self._rules.count_name(parent.path)
        _, names = self._whiteouts.setdefault(os.fstat(parent.fd).st_ino, (parent.path, set()))
        names.add(operation.name)

    def _mark_opaque(self, parent: _Folder, _operation: Operation, _payload: Payload) -> None:
        self._opaque[os.fstat(parent.fd).st_ino] = parent.path

    # -- parents ------------------------------------------------------------------------------

    def _folder(self, path: bytes) -> _Folder:
        """Return the directory that `path` means, making what is missing."""
        if not path:
            return self._root
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        above, name = split_name(path)
        # Up to the nearest folder that is open, then down again: no recursion over a deep path.
        pending = [(path, name)]
        while above and above not in self._open:
            path, (above, name) = above, split_name(above)
            pending.append((path, name))
        folder = self._open[above] if above else self._root
        for path, name in reversed(pending):
            folder = self._remember(path, self._enter(folder, name, make=True))
        return folder

    def _existing_folder(self, path: bytes) -> _Folder:
        """Return the directory that `path` means; FileNotFoundError if it is not there."""
        found = self._open.get(path)
        if found is not None:
            return found
        folder = self._root
        way = b""
        for name in path.split(b"/") if path else ():
            way = _join(way, name)
            folder = self._open.get(way) or self._remember(way, self._enter(folder, name, make=False))
        return folder

    def _remember(self, path: bytes, folder: _Folder) -> _Folder:
        self._open[path] = folder
        return folder

    def _trim(self) -> None:
        """Close the folders used longest ago; only between operations, which hold some open."""
        while self._passing:
            os.close(self._passing.pop())
        while len(self._open) > _OPEN_FOLDERS:
            os.close(self._open.popitem(last=False)[1].fd)

    def _enter(self, start: _Folder, name: bytes, *, make: bool) -> _Folder:
        """Return the directory `name` of `start`, through links of this layer but inside the root.

        The descriptor is always a new one.
        """
        folder, pending, followed = _Folder(os.dup(start.fd), start.path), [name], 0
        while pending:
            part = pending.pop()
            self._steps += 1
            if self._steps > _STEPS:
                os.close(folder.fd)
                raise Refused(f"layer has links that lead in too many steps through {printable(name)!r}")
            if part == b"..":
                above = split_name(folder.path)[0]
                os.close(folder.fd)
                folder = _Folder(self._open_real(above), above)
                continue
            try:
                fd = self._step(folder, part, make=make)
            except BaseException:
                os.close(folder.fd)
                raise
            if fd is not None:
                os.close(folder.fd)
                folder = _Folder(fd, _join(folder.path, part))
                continue
            followed += 1
            text = os.readlink(part, dir_fd=folder.fd)
            if followed > limits.LINKS_FOLLOWED:
                os.close(folder.fd)
                raise Refused(f"layer has links in a circle at {printable(name)!r}")
            if text.startswith(b"/"):
                os.close(folder.fd)
                folder = _Folder(os.dup(self._root.fd), b"")
            pending += [p for p in reversed(text.split(b"/")) if p not in {b"", b"."}]
        return folder

    def _open_real(self, path: bytes) -> int:
        return open_beneath(self._root.fd, path, _FOLDER)

    def _step(self, folder: _Folder, name: bytes, *, make: bool) -> int | None:
        """Open the directory `name`, made if need be; None if it is a symlink."""
        try:
            return os.open(name, _FOLDER, dir_fd=folder.fd)
        except FileNotFoundError:
            if not make:
                raise
            made = self._make_directory(folder, name)
            self._directories[made.st_ino] = (_join(folder.path, name), None)
            return os.open(name, _FOLDER, dir_fd=folder.fd)
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG}:
                raise
            # What a link says may be too long for a name.
            self._rules.check_folder(_join(folder.path, name))
            mode = _look(folder.fd, name).st_mode
            if stat.S_ISLNK(mode):
                return None
            if stat.S_ISDIR(mode):
                raise
            raise Refused(
                f"layer has an entry below {printable(_join(folder.path, name))!r}, which is no folder"
            ) from None

    def _clear(self, parent: _Folder, name: bytes) -> None:
        """Remove what an earlier entry of this layer made at `name`."""
        mode = _look(parent.fd, name).st_mode
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            # Any open folder may have been reached through what goes now, even its own parent.
            self._forget_open(keep=parent.fd)
        remove_entry(parent.fd, name)
        self._is_counted = False

    def _forget_open(self, keep: int = -1) -> None:
        """Close all folders, or keep one open until the current operation ends."""
        for folder in self._open.values():
            if folder.fd == keep:
                self._passing.append(keep)
            else:
                os.close(folder.fd)
        self._open.clear()

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> Notes:
        """Give all directories their attributes and return what waits for the parents."""
        self._forget_open()
        implied: list[bytes] = []
        for inode, (path, entry) in self._directories.items():
            fd = self._still(path, inode)
            if fd is None:
                continue
            try:
                if entry is None:
                    implied.append(path)
                _finish_directory(fd, entry)
            finally:
                os.close(fd)
        whiteouts = [
            (path, name)
            for inode, (path, names) in self._whiteouts.items()
            if self._is_still(path, inode)
            for name in sorted(names)
        ]
        opaque = [path for inode, path in self._opaque.items() if self._is_still(path, inode)]
        if not self._is_counted:
            self._size, self._inodes = measure(self._root.fd)
        os.fchmod(self._root.fd, 0o755)
        os.fchown(self._root.fd, 0, 0)
        os.utime(self._root.fd, ns=(0, 0))
        return Notes(
            whiteouts=whiteouts,
            opaque=opaque,
            implied=sorted(implied),
            size=self._size,
            inodes=self._inodes,
        )

    def close(self) -> None:
        """Close what is open below the root; may be called again."""
        self._forget_open()
        self._trim()

    def _still(self, path: bytes, inode: int) -> int | None:
        """Open the directory at `path` if it is the one with this inode."""
        try:
            fd = self._open_real(path)
        except OSError as error:
            if error.errno not in _REPLACED:
                raise
            return None  # replaced by something else since
        if os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
        return None

    def _is_still(self, path: bytes, inode: int) -> bool:
        fd = self._still(path, inode)
        if fd is not None:
            os.close(fd)
        return fd is not None


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _look(folder: int, name: bytes) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _write_all(file: int, piece: memoryview) -> None:
    while len(piece) > (written := os.write(file, piece)):
        piece = piece[written:]


def _own(fd: int, entry: Entry) -> None:
    """Give owner, xattrs and mode: in this order, as each undoes parts of the next."""
    changed = bool(entry.uid or entry.gid)
    if changed:
        os.fchown(fd, entry.uid, entry.gid)
    for key, value in entry.xattrs.items():
        _set_xattr(fd, key, value, entry)
    if changed or entry.xattrs:
        os.fchmod(fd, entry.mode)


def _set_xattr(fd: int, key: bytes, value: bytes, entry: Entry) -> None:
    try:
        os.setxattr(fd, key, value)
    except OSError as error:
        # ext4 says "no space" of an xattr that is too large for it, also on an empty disk.
        room = os.fstatvfs(fd).f_bavail
        if error.errno == errno.E2BIG or (error.errno == errno.ENOSPC and room > _ROOM_BLOCKS):
            raise Refused(
                f"xattrs of {printable(entry.name)!r} do not fit in this file system; use another --root"
            ) from None
        raise


def _finish_directory(fd: int, entry: Entry | None) -> None:
    if entry is None:
        os.fchmod(fd, 0o755)
        os.utime(fd, ns=(0, 0))
        return
    _own(fd, entry)
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime, entry.mtime))
