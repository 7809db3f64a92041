"""Holds a committed snapshot's folder against its layer as that streams by: a sink that only looks.

Sync; one thread. What an entry says is compared when it comes, and what differs is kept until the layer
ends: a later entry may take it back. A file that a hard link takes elsewhere before its first name goes
to another is looked for there in the end. What a backend makes of a layer on what is below (markers,
what folders inherit, what is filled in) is for its `Standing` to say.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from engine import limits
from engine.callables import named
from engine.diff.compare import Difference, How
from engine.diff.layer import Attributes, Folder, Leaf, Payload, folders, path_of
from engine.diff.tar import Entry
from engine.errors import DataLoss, printable
from engine.fs.attributes import beneath, folder_descriptor
from snapshotters.descriptors import WatchedFolders
from snapshotters.differing import (
    attributes_differ,
    content_differs,
    content_of,
    entry_differs,
    look,
    open_file,
    twins_differ,
)
from snapshotters.folder_sink import TREE

__all__ = ["Discrepancy", "FolderComparison", "Standing", "Whereabouts", "open_comparison"]

# Of a folder that is not there, or a link or a file in its place.
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot to be compared: numbers below `folder`; `below` is what it stands on, nearest first."""

    folder: str
    number: int
    below: list[int]
    standing: str
    """The name of what makes a `Standing`."""


class Discrepancy(NamedTuple):
    """Something that differs; without a name it is about the folder itself."""

    folder: bytes
    name: bytes
    how: How
    detail: str = ""
    by_below: bool = False

    def shown(self) -> Difference:
        """Return it as others see it."""
        path = os.path.join(self.folder, self.name).rstrip(b"/")
        text = path.decode("utf-8", "backslashreplace")
        return Difference(path=text, how=self.how, detail=self.detail, by_below=self.by_below)


class Standing(Protocol):
    """What a backend makes of a layer once it knows what is below it."""

    def __call__(
        self, tree: WatchedFolders, root: Folder, below: Sequence[Path], /
    ) -> Iterable[Discrepancy]:
        """Yield what differs in the folders of a layer; what its entries say is compared already.

        Folders that are not there are passed over.
        """


class _Trouble(NamedTuple):
    """What is wrong at a name, and what the layer has there; `content` is "" where it is as on disk."""

    how: How
    detail: str
    entry: Entry | None
    content: str = ""


class _Moved(NamedTuple):
    """Where a file first was that has only other names now."""

    folder: Folder
    name: bytes
    trouble: _Trouble | None


@contextmanager
def open_comparison(place: str) -> Iterator["FolderComparison"]:
    """Give what compares with a committed snapshot for the length of a block."""
    found = msgspec.json.decode(place, type=Whereabouts)
    folder = Path(found.folder)
    below = [folder / str(number) / TREE for number in found.below]
    with ExitStack() as inside:
        try:
            top = inside.enter_context(folder_descriptor(folder))
            root = inside.enter_context(beneath(top, f"{found.number}/{TREE}".encode()))
        except OSError as error:
            if error.errno not in _NO_FOLDER:
                raise
            raise DataLoss(f"there is no folder {folder / str(found.number) / TREE}") from None
        opened = inside.enter_context(WatchedFolders(root))
        yield FolderComparison(opened, named(found.standing)(), below)


class FolderComparison:
    """Compares one layer with the tree that `opened` opens the folders of."""

    def __init__(self, opened: WatchedFolders, standing: Standing, below: Sequence[Path]) -> None:
        self._opened = opened
        self._standing = standing
        self._below = below
        self._here: Folder | None = None
        self._here_fd: int | None = None
        self._troubles: dict[tuple[Folder, bytes], _Trouble] = {}
        self._linked: set[tuple[Folder, bytes]] = set()  # names that are not their file's first
        self._shared: dict[tuple[Folder, bytes], int] = {}  # inodes of files with several names
        self._moved: dict[Leaf, _Moved] = {}
        self._found: list[Discrepancy] = []

    def _folder(self, folder: Folder) -> int | None:
        """Return a descriptor of a folder, None if it is not there."""
        if folder is not self._here:
            self._opened.trim()
            self._here = folder
            try:
                self._here_fd = self._opened.get(folder)
            except OSError:
                self._here_fd = None
        return self._here_fd

    # -- entries ------------------------------------------------------------------------------

    def make_folder(self, parent: Folder, name: bytes) -> None:
        """Look whether a folder is there."""
        info = look(self._folder(parent), name)
        if info is None:
            self._troubles[parent, name] = _Trouble(How.MISSING, "", None)
        elif not stat.S_ISDIR(info.st_mode):
            self._troubles[parent, name] = _Trouble(How.CHANGED, "it is no folder", None)

    def make_file(self, parent: Folder, name: bytes, entry: Entry, payload: Payload) -> None:
        """Compare a regular file, and what is in it."""
        folder = self._folder(parent)
        info = look(folder, name)
        if folder is None or info is None or not stat.S_ISREG(info.st_mode):
            running = hashlib.sha256()
            how, detail = self._how(folder, name, info, entry)
            for piece in payload() if entry.size else ():
                running.update(piece)
            self._troubles[parent, name] = _Trouble(how, detail, entry, running.hexdigest())
            return
        self._note_links(parent, name, info)
        found = entry_differs(folder, name, info, entry)
        file = open_file(folder, name)
        try:
            xattrs = tuple(entry.xattrs.items())
            found += attributes_differ(file, Attributes(entry.mode, xattrs=xattrs), is_folder=False)
            content = content_differs(file, entry, payload() if entry.size else ())
        finally:
            os.close(file)
        if content and info.st_size == entry.size:
            found.append("content")
        if found:
            self._troubles[parent, name] = _Trouble(How.CHANGED, "; ".join(found), entry, content)

    def make_symlink(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Compare a symbolic link."""
        self._compare(parent, name, entry)

    def make_node(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Compare a device or a fifo."""
        self._compare(parent, name, entry)

    def _compare(self, parent: Folder, name: bytes, entry: Entry) -> None:
        folder = self._folder(parent)
        info = look(folder, name)
        if info is not None:
            self._note_links(parent, name, info)
        how, detail = self._how(folder, name, info, entry)
        if info is None or detail:
            self._troubles[parent, name] = _Trouble(how, detail, entry)

    @staticmethod
    def _how(
        folder: int | None, name: bytes, info: os.stat_result | None, entry: Entry
    ) -> tuple[How, str]:
        if folder is None or info is None:
            return How.MISSING, ""
        return How.CHANGED, "; ".join(entry_differs(folder, name, info, entry))

    def make_link(
        self,
        parent: Folder,
        name: bytes,
        target: tuple[Folder, bytes],
        replaced: Folder | Leaf | None,
    ) -> None:
        """Look whether a further name is there; whether it is that of the same file shows in the end."""
        if replaced is not None:
            self.remove(parent, name, replaced)
        self._linked.add((parent, name))
        info = look(self._folder(parent), name)
        if info is None:
            self._troubles[parent, name] = _Trouble(How.MISSING, "", None)
        else:
            self._note_links(parent, name, info)

    def _note_links(self, parent: Folder, name: bytes, info: os.stat_result) -> None:
        if info.st_nlink > 1:
            self._shared[parent, name] = info.st_ino

    def remove(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        """Forget what was found at a name: the layer has something else there."""
        self._forget(parent, name, node)
        if isinstance(node, Folder):
            self._here = None
            for folder in folders(node):
                self._opened.drop(folder)
                for below, child in folder.names.items():
                    self._forget(folder, below, child)

    def _forget(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        trouble = self._troubles.pop((parent, name), None)
        self._shared.pop((parent, name), None)
        is_first = (parent, name) not in self._linked
        self._linked.discard((parent, name))
        if isinstance(node, Leaf) and node.links and is_first and node not in self._moved:
            self._moved[node] = _Moved(parent, name, trouble)

    # -- the end ------------------------------------------------------------------------------

    def finish(self, root: Folder, size: int, inodes: int) -> int:
        """Compare what had to wait for the whole layer; no ACL is left out by looking."""
        for folder in folders(root):
            for name, node in folder.names.items():
                if isinstance(node, Leaf) and node in self._moved:
                    self._compare_moved(folder, name, node)
        self._compare_links(root)
        for (folder, name), trouble in self._troubles.items():
            above = (folder.parent, folder.name)
            if not folder.depth or not self._is_lost(above):
                self._found.append(Discrepancy(path_of(folder), name, trouble.how, trouble.detail))
        self._found += self._standing(self._opened, root, self._below)
        return 0

    def _is_lost(self, place: tuple[Folder, bytes]) -> bool:
        """Say whether a folder is told of as missing, so that nothing in it has to be."""
        while True:
            if place in self._troubles:
                return True
            folder = place[0]
            if not folder.depth:
                return False
            place = (folder.parent, folder.name)

    def _compare_moved(self, folder: Folder, name: bytes, node: Leaf) -> None:
        first = self._moved[node]
        if (folder, name) in self._troubles:
            return
        self._opened.trim()
        here = self._opened.get(folder)
        info = look(here, name)
        assert info is not None
        found: list[str] = []
        entry = first.trouble.entry if first.trouble else None
        content = first.trouble.content if first.trouble else ""
        if entry is not None:
            found += entry_differs(here, name, info, entry)
        if not found and entry is not None and content:
            file = open_file(here, name)
            try:
                if content_of(file, entry) != content:
                    found.append("content")
            finally:
                os.close(file)
        elif not found and not entry:
            found += twins_differ(here, name, self._opened.get(first.folder), first.name)
        if found:
            self._troubles[folder, name] = _Trouble(How.CHANGED, "; ".join(found), entry)

    def _compare_links(self, root: Folder) -> None:
        """See that names share a file where the layer says so, and nowhere else."""
        inodes: dict[Leaf, tuple[int | None, tuple[Folder, bytes]]] = {}
        holders: dict[int, tuple[Leaf, bytes]] = {}
        for folder in folders(root):
            for name, node in folder.names.items():
                if isinstance(node, Folder) or (folder, name) in self._troubles:
                    continue
                number = self._shared.get((folder, name))
                path = os.path.join(path_of(folder), name)
                if node.links > 1:
                    first, where = inodes.setdefault(node, (number, (folder, name)))
                    if number is None or first != number:
                        other = os.path.join(path_of(where[0]), where[1])
                        detail = f"not the same file as {printable(other)!r}"
                        if where != (folder, name):
                            self._troubles[folder, name] = _Trouble(How.CHANGED, detail, None)
                        continue
                if number is not None:
                    holder, other = holders.setdefault(number, (node, path))
                    if holder is not node:
                        detail = f"the same file as {printable(other)!r}"
                        self._troubles[folder, name] = _Trouble(How.CHANGED, detail, None)

    def differences(self) -> Sequence[Difference]:
        """Return what differs, sorted by path."""
        found = sorted(set(self._found))[: limits.DIFFERENCES]
        return [finding.shown() for finding in found]
