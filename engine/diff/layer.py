"""A layer as it will be: the tree between the layer rules and whatever a backend writes.

Pure. Operations go in, one after the other; what comes out are calls of a sink whose places are
settled: a real folder of this layer and a name in it. Links are followed here, inside the root, and
what an entry replaces is taken away here, so that no sink resolves, compares or counts. Cost is
linear in what the layer holds: each step is a lookup, and `Budget` bounds what links add to them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

from engine import limits
from engine.diff.budget import BLOCK, Budget
from engine.diff.rules import Action, Operation, Rules, split_name
from engine.diff.sparse import blocks
from engine.diff.tar import Entry
from engine.errors import Refused, printable

__all__ = [
    "Attributes",
    "Folder",
    "LayerTree",
    "Leaf",
    "Payload",
    "Place",
    "Sink",
    "Symlink",
    "dissolve",
    "folders",
    "path_of",
]

_LONG_LINK = 60  # bytes: ext4 keeps a shorter one in its inode
_NOTHING: frozenset[bytes] = frozenset()  # most folders hide nothing, and there may be many

Payload = Callable[[], Iterator[memoryview]]


class Place(Protocol):
    """A folder by where it is: its name in the folder above; at depth 0 the root, its own parent."""

    @property
    def parent(self) -> Self:
        """The folder above."""

    @property
    def name(self) -> bytes:
        """The name in the folder above."""

    @property
    def depth(self) -> int:
        """How many folders are above."""


class Attributes(NamedTuple):
    """What a folder has besides its names; `mtime` in nanoseconds. By default those of no entry."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class Leaf:
    """Anything but a folder; the names of one file share the object."""

    __slots__ = ("links", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.links = 1


class Symlink(Leaf):
    """A symbolic link; `steps` is its text as components, last first."""

    __slots__ = ("is_absolute", "steps", "text")

    def __init__(self, text: bytes) -> None:
        super().__init__(BLOCK if len(text) >= _LONG_LINK else 0)
        self.text = text
        self.is_absolute = text.startswith(b"/")
        self.steps: list[bytes] | None = None  # split when first followed


class Folder:
    """A folder; `attributes` is None while only something within it was named.

    It hides the names `hidden` of the
    layers below, and all of them if it `is_opaque`. `is_gone` once a later entry replaced it, or
    something above it.
    """

    __slots__ = ("attributes", "depth", "hidden", "is_gone", "is_opaque", "name", "names", "parent")

    def __init__(self, parent: "Folder | None", name: bytes) -> None:
        self.parent = parent or self
        self.name = name
        self.depth: int = parent.depth + 1 if parent else 0
        self.attributes: Attributes | None = None
        self.names: dict[bytes, Folder | Leaf] = {}
        self.hidden: set[bytes] | frozenset[bytes] = _NOTHING
        self.is_opaque = False
        self.is_gone = False

    def hide(self, name: bytes) -> None:
        """Hide a name of the layers below."""
        if isinstance(self.hidden, frozenset):
            self.hidden = set(self.hidden)
        self.hidden.add(name)


class Sink(Protocol):
    """What a backend makes of a layer. Names are free when something is made at them."""

    def make_folder(self, parent: Folder, name: bytes) -> None:
        """Make an empty folder; its attributes come with `finish`."""

    def make_file(self, parent: Folder, name: bytes, entry: Entry, payload: Payload) -> None:
        """Make a regular file with the bytes of `payload`, of a sparse one (`entry.parts`) its parts."""

    def make_symlink(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Make a symbolic link."""

    def make_node(self, parent: Folder, name: bytes, entry: Entry) -> None:
        """Make a device or a fifo."""

    def make_link(
        self,
        parent: Folder,
        name: bytes,
        target: tuple[Folder, bytes],
        replaced: Folder | Leaf | None,
    ) -> None:
        """Give the file at `target` a further name, in place of `replaced`, which may hold it."""

    def remove(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        """Remove what this sink made at a name, a whole tree if it is a folder."""

    def finish(self, root: Folder, size: int, inodes: int) -> int:
        """End the layer: give folders their attributes and keep what waits for the layers below.

        Return how many ACLs had to be left out, because they cannot be held here.
        """


class LayerTree:
    """The tree of one layer, built by `apply` and carried out by `sink`."""

    def __init__(self, sink: Sink, rules: Rules, budget: Budget) -> None:
        self.root = Folder(None, b"")
        self.size = 0
        self.inodes = 0
        self._sink = sink
        self._rules = rules
        self._budget = budget
        self._last: tuple[bytes, Folder] = (b"", self.root)
        self._do: dict[Action, Callable[[Folder, Operation, Payload], None]] = {
            Action.FILE: self._file,
            Action.DIRECTORY: self._directory,
            Action.SYMLINK: self._symlink,
            Action.HARDLINK: self._hardlink,
            Action.NODE: self._node,
            Action.WHITEOUT: self._whiteout,
            Action.OPAQUE: self._mark_opaque,
        }

    def apply(self, operation: Operation, payload: Payload) -> None:
        """Carry out one operation; `payload` gives the bytes of a file. Raises Refused."""
        path, parent = self._last
        if operation.parent != path:
            parent = self._folder(operation.parent)
            self._last = (operation.parent, parent)
        self._do[operation.action](parent, operation, payload)

    def finish(self) -> int:
        """End the layer: what waits for the layers below is reduced to what they can show.

        Return how many ACLs were left out.
        """
        for folder in folders(self.root):
            _reduce(folder)
        return self._sink.finish(self.root, self.size, self.inodes)

    # -- the operations -----------------------------------------------------------------------

    def _file(self, parent: Folder, operation: Operation, payload: Payload) -> None:
        # Most entries come through here: few calls.
        entry, name = operation.entry, operation.name
        if name in parent.names:
            self._free(parent, name)
        if entry.parts is None:
            size = -(-entry.size // BLOCK) * BLOCK
        else:
            size = blocks(entry.parts, BLOCK) * BLOCK
            self._budget.scattered(size)
        self._sink.make_file(parent, name, entry, payload)
        self.size += size
        self.inodes += 1
        self._budget.kept(len(name))
        parent.names[name] = Leaf(size)

    def _symlink(self, parent: Folder, operation: Operation, _payload: Payload) -> None:
        self._free(parent, operation.name)
        self._sink.make_symlink(parent, operation.name, operation.entry)
        self._budget.kept(len(operation.entry.link))
        self._put(parent, operation.name, Symlink(operation.entry.link))

    def _node(self, parent: Folder, operation: Operation, _payload: Payload) -> None:
        self._free(parent, operation.name)
        self._sink.make_node(parent, operation.name, operation.entry)
        self._put(parent, operation.name, Leaf(0))

    def _directory(self, parent: Folder, operation: Operation, _payload: Payload) -> None:
        found = parent.names.get(operation.name)
        if not isinstance(found, Folder):
            self._free(parent, operation.name)
            found = self._make_folder(parent, operation.name)
        entry = operation.entry
        self._budget.kept(sum(len(key) + len(value) for key, value in entry.xattrs.items()))
        xattrs = tuple(entry.xattrs.items())
        found.attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime, xattrs)

    def _hardlink(self, parent: Folder, operation: Operation, _payload: Payload) -> None:
        # The target first: it may be below what this entry replaces, or that itself.
        holder, name = self._link_target(operation)
        target = holder.names[name]
        assert isinstance(target, Leaf)
        old = parent.names.get(operation.name)
        target.links += 1
        if old is not None:
            self._forget(parent, operation.name, old)
        # Attributes of the entry are ignored: they are those of the target, or an attack on it.
        self._sink.make_link(parent, operation.name, (holder, name), old)
        self._keep(parent, operation.name, target)

    def _whiteout(self, parent: Folder, operation: Operation, _payload: Payload) -> None:
        if operation.name not in parent.hidden:
            self._budget.kept(len(operation.name))
            parent.hide(operation.name)

    def _mark_opaque(self, parent: Folder, _operation: Operation, _payload: Payload) -> None:
        parent.is_opaque = True

    # -- nodes --------------------------------------------------------------------------------

    def _put(self, parent: Folder, name: bytes, node: Leaf) -> None:
        self.size += node.size
        self.inodes += 1
        self._keep(parent, name, node)

    def _keep(self, parent: Folder, name: bytes, node: Folder | Leaf) -> None:
        self._budget.kept(len(name))
        parent.names[name] = node

    def _make_folder(self, parent: Folder, name: bytes) -> Folder:
        self._rules.check_folder_name(name)
        if parent.depth >= limits.PATH_DEPTH:
            raise Refused(f"{printable(name)!r} is over {limits.PATH_DEPTH} folders deep")
        self._budget.folder()
        self._sink.make_folder(parent, name)
        folder = Folder(parent, name)
        self.size += BLOCK
        self.inodes += 1
        self._keep(parent, name, folder)
        return folder

    def _free(self, parent: Folder, name: bytes) -> None:
        """Remove what an earlier entry of this layer made at a name."""
        old = parent.names.get(name)
        if old is not None:
            self._forget(parent, name, old)
            self._sink.remove(parent, name, old)

    def _forget(self, parent: Folder, name: bytes, old: Folder | Leaf) -> None:
        """Take a node out of the tree, and off the counts."""
        if isinstance(old, Folder | Symlink):
            self._last = (b"", self.root)  # the way to it may have led through what goes now
        del parent.names[name]
        pending: list[Folder | Leaf] = [old]
        while pending:
            node = pending.pop()
            if isinstance(node, Folder):
                node.is_gone = True
                self.size -= BLOCK
                self.inodes -= 1
                pending += node.names.values()
            else:
                node.links -= 1
                if not node.links:
                    self.size -= node.size
                    self.inodes -= 1

    # -- places -------------------------------------------------------------------------------

    def _folder(self, path: bytes) -> Folder:
        """Return the folder that `path` means, making what is missing."""
        folder = self.root
        if path:
            for name in path.split(b"/"):
                found = folder.names.get(name)
                folder = found if isinstance(found, Folder) else self._enter(folder, name)
        return folder

    def _link_target(self, operation: Operation) -> tuple[Folder, bytes]:
        """Return the place of the file that a hard link means; a link itself is meant as it is."""
        above, name = split_name(operation.target)
        folder: Folder | None = self.root
        for part in above.split(b"/") if above else ():
            assert folder is not None
            folder = self._follow(folder, part, make=False)
            if folder is None:
                break
        if folder is None or not isinstance(folder.names.get(name), Leaf):
            raise Refused(
                f"hard link {printable(operation.entry.name)!r}: its target "
                f"{printable(operation.target)!r} is no file of the same layer"
            )
        return folder, name

    def _enter(self, folder: Folder, name: bytes) -> Folder:
        found = self._follow(folder, name, make=True)
        assert found is not None
        return found

    def _follow(self, folder: Folder, name: bytes, *, make: bool) -> Folder | None:
        """Return the folder `name` means in `folder`, through links but inside the root.

        What is missing is made, or None is returned.
        """
        pending, links, steps = [name], 0, 0
        while pending:
            part = pending.pop()
            if part == b"..":
                folder = folder.parent
                continue
            node = folder.names.get(part)
            if isinstance(node, Folder):
                folder = node
            elif node is None:
                if not make:
                    return None
                folder = self._make_folder(folder, part)
            elif isinstance(node, Symlink):
                links += 1
                if links > limits.LINKS_FOLLOWED:
                    raise Refused(f"layer has links in a circle at {printable(name)!r}")
                if node.is_absolute:
                    folder = self.root
                further = _steps_of(node)
                steps += len(further) + 1
                self._budget.link_steps(len(further) + 1)
                if steps > limits.LAYER_ENTRY_STEPS:
                    raise Refused(
                        f"layer has links that lead in too many steps through {printable(name)!r}"
                    )
                pending += further
            elif make:
                where = path_of(folder) + b"/" + part if folder.depth else part
                raise Refused(f"layer has an entry below {printable(where)!r}, which is no folder")
            else:
                return None
        return folder


def _steps_of(link: Symlink) -> list[bytes]:
    if link.steps is None:
        link.steps = [part for part in reversed(link.text.split(b"/")) if part not in {b"", b"."}]
    return link.steps


def folders(root: Folder) -> Iterator[Folder]:
    """Yield `root` and all folders below it, each before what is in it, branch by branch."""
    pending = [root]
    while pending:
        folder = pending.pop()
        yield folder
        pending += [node for node in folder.names.values() if isinstance(node, Folder)]


def dissolve(root: Folder) -> None:
    """Take a tree apart that is not needed any more.

    Its folders name each other, so that nothing would free it but a garbage collection, which counts
    objects, not the names that they hold: a worker would grow with each layer.
    """
    for folder in list(folders(root)):
        folder.parent = folder
        folder.names = {}
        folder.hidden = _NOTHING


def path_of(place: Place) -> bytes:
    """Return the path of a folder below the root, "" for the root itself."""
    parts = []
    while place.depth:
        parts.append(place.name)
        place = place.parent
    return b"/".join(reversed(parts))


def _reduce(folder: Folder) -> None:
    """Turn what `folder` hides into what is left to do once the layers below are known.

    A hidden name that the layer has itself is covered: by a folder that is opaque, or by a leaf.
    """
    covered = folder.hidden & folder.names.keys()
    for name in covered:
        own = folder.names[name]
        if isinstance(own, Folder):
            own.is_opaque = True
    if covered:
        folder.hidden = folder.hidden - covered
