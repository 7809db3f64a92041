"""Makes a layer as files in an empty folder of its own: for every backend whose snapshots are folders.

Sync; one thread. Places come resolved (`engine.diff.layer`): nothing here follows a link or looks for
what is in the way, and everything is made with O_EXCL or its like.

The process's umask must be 0. Folders get owner, mode, xattrs and times in `finish`: a setgid bit
would otherwise leak into what is made inside, and every file would undo the time.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.diff import outline, tar
from engine.diff.layer import Attributes, Folder, Leaf, Payload, folders
from engine.diff.outline import Outline
from engine.diff.sparse import placed
from engine.diff.tar import Entry
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import remove_entry
from snapshotters.attributes import give_attributes, give_owner
from snapshotters.descriptors import OpenFolders

__all__ = ["OUTLINE", "TREE", "FolderSink", "open_sink"]

TREE, OUTLINE = "fs", "outline"
"""What a snapshot's folder holds: the tree, or the layer of it, and a layer's outline."""

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODE_TYPES = {
    tar.CHAR_DEVICE: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}
_ASIDE = b".wh..wh.lamina"  # a name that no layer can have
_NONE = Attributes()


@contextmanager
def open_sink(place: str) -> Iterator["FolderSink"]:
    """Give a sink into the folder `place` of a snapshot for the length of a block."""
    with folder_descriptor(Path(place, TREE)) as root, OpenFolders(root) as opened:
        yield FolderSink(root, opened, Path(place, OUTLINE))


class FolderSink:
    """Makes one layer in the directory `root` is a descriptor of, and its outline in a file."""

    def __init__(self, root: int, opened: OpenFolders, file: Path) -> None:
        self._root = root
        self._opened = opened
        self._outline = file
        self._here: Folder | None = None
        self._here_fd = -1
        self._left_out = 0

    def _folder(self, folder: Folder) -> int:
        if folder is not self._here:  # mostly it is: archives go folder by folder
            self._opened.trim()
            self._here, self._here_fd = folder, self._opened.get(folder)
        return self._here_fd

    def make_folder(self, parent: Folder, name: bytes) -> None:
        """Make an empty folder; its attributes come with `finish`."""
        os.mkdir(name, 0o755, dir_fd=self._folder(parent))

    def make_file(self, parent: Folder, name: bytes, entry: Entry, payload: Payload) -> None:
        """Make a regular file with the bytes of `payload`."""
        file = os.open(name, _NEW_FILE, entry.mode, dir_fd=self._folder(parent))
        try:
            if entry.parts is None:
                for piece in payload():
                    _write_all(file, piece)
            else:
                _write_parts(file, entry.size, placed(entry.parts, payload()))
            if entry.uid or entry.gid or entry.xattrs:
                xattrs = tuple(entry.xattrs.items())
                left_out = give_owner(file, entry.mode, entry.uid, entry.gid, xattrs, entry.name)
                self._left_out += left_out
            os.utime(file, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(file)

    def make_symlink(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Make a symbolic link."""
        folder = self._folder(parent)
        os.symlink(entry.link, name, dir_fd=folder)
        _finish_node(folder, name, entry)

    def make_node(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Make a device or a fifo."""
        folder = self._folder(parent)
        mode = _NODE_TYPES[entry.type] | entry.mode
        os.mknod(name, mode, os.makedev(entry.major, entry.minor), dir_fd=folder)
        _finish_node(folder, name, entry)
        if entry.mode & 0o6000 and (entry.uid or entry.gid):
            # chown cleared them. No link can be here: this process has just made the node.
            os.chmod(name, entry.mode, dir_fd=folder)

    def make_link(
        self,
        parent: Folder,
        name: bytes,
        target: tuple[Folder, bytes],
        replaced: Folder | Leaf | None,
    ) -> None:
        """Give the file at `target` a further name, in place of `replaced`, which may hold it."""
        self._here = None
        self._opened.trim()
        holder, other = target
        source, folder = self._opened.get(holder), self._opened.get(parent)
        made = name if replaced is None else _ASIDE
        os.link(other, made, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        if replaced is not None:
            self.remove(parent, name, replaced)
            folder = self._opened.get(parent)
            os.rename(_ASIDE, name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        """Remove what this sink made at a name, a whole tree if it is a folder."""
        if isinstance(node, Folder):
            self._here = None
            for place in self._opened.places():
                if isinstance(place, Folder) and (place is node or place.is_gone):
                    self._opened.drop(place)
        remove_entry(self._folder(parent), name)

    def finish(self, root: Folder, size: int, inodes: int) -> int:
        """Give folders their attributes and write the outline; return how many ACLs were left out."""
        for folder in folders(root):
            if folder.depth:
                self._finish_folder(folder, folder.attributes or _NONE)
        os.fchmod(self._root, 0o755)
        os.fchown(self._root, 0, 0)
        os.utime(self._root, ns=(0, 0))
        with self._outline.open("wb") as file:
            file.writelines(outline.encode(Outline(root, size, inodes)))
        return self._left_out

    def _finish_folder(self, folder: Folder, attributes: Attributes) -> None:
        parent = self._folder(folder.parent)
        mode, uid, gid, mtime, xattrs = attributes
        if uid or gid or xattrs:
            self._left_out += give_attributes(self._opened.get(folder), attributes, folder.name)
            return
        # By name where no more is to be done: the folder is of this sink's making, no link.
        if mode != _NONE.mode:
            os.chmod(folder.name, mode, dir_fd=parent)
        os.utime(folder.name, ns=(mtime, mtime), dir_fd=parent, follow_symlinks=False)


def _finish_node(folder: int, name: bytes, entry: Entry) -> None:
    if entry.uid or entry.gid:
        os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
    os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=folder, follow_symlinks=False)


def _write_parts(file: int, size: int, parts: Iterable[tuple[int, memoryview]]) -> None:
    """Write the parts of a sparse file; what is between them, and behind, stays a hole."""
    for offset, piece in parts:
        os.lseek(file, offset, os.SEEK_SET)
        _write_all(file, piece)
    os.ftruncate(file, size)


def _write_all(file: int, piece: memoryview) -> None:
    while len(piece) > (written := os.write(file, piece)):
        piece = piece[written:]
