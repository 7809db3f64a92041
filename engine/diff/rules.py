"""The layer rules: archive entries in, a small closed set of operations out.

Pure. Everything that an image says is checked here: names, types, links, attributes, counts. What
comes out names its place as (parent, name): normalised, relative, without `..`, and never a whiteout
name among ordinary ones. How layers combine is in docs/layers.md.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum, auto

import msgspec

from engine import limits
from engine.diff import acl, tar
from engine.diff.budget import Budget
from engine.diff.tar import Entry
from engine.errors import Refused, printable

__all__ = ["WHITEOUT_PREFIX", "Action", "Operation", "Rules", "split_name"]

WHITEOUT_PREFIX = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS_OWN = frozenset((b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph"))
_ODD_PARTS = frozenset((b"", b".", b".."))
_HIGHEST_ID = (1 << 32) - 2  # the next one means "leave as it is" to chown(2)
_HIGHEST_MAJOR, _HIGHEST_MINOR = (1 << 12) - 1, (1 << 20) - 1  # what dev_t of Linux holds
_LATEST = (1 << 63) - 1  # nanoseconds

# A device or fifo can have one too, but only by a path, which nothing here goes by.
_WITH_ACLS = {acl.ACCESS: {tar.FILE, tar.DIRECTORY}, acl.DEFAULT: {tar.DIRECTORY}}
_CAPABILITY = b"security.capability"
_CAPABILITY_SIZES = {0x02000000: 20, 0x03000000: 24}  # linux/capability.h; no kernel takes 1 any more
_CAPABILITY_EFFECTIVE = 0x1  # the one flag beside the revision


class Action(IntEnum):
    """What there is to do for one entry."""

    DIRECTORY = auto()
    FILE = auto()
    SYMLINK = auto()
    HARDLINK = auto()
    NODE = auto()
    """A device or a fifo."""
    WHITEOUT = auto()
    """Hide `name` of the layers below."""
    OPAQUE = auto()
    """Hide all that the layers below have in `parent`."""


class Operation(msgspec.Struct, frozen=True, gc=False):
    """One thing to do; `target` is the normalised path of a hard link's other name."""

    action: Action
    parent: bytes
    name: bytes
    entry: Entry
    target: bytes = b""


_ACTIONS = {
    tar.FILE: Action.FILE,
    tar.DIRECTORY: Action.DIRECTORY,
    tar.SYMLINK: Action.SYMLINK,
    tar.HARDLINK: Action.HARDLINK,
    tar.CHAR_DEVICE: Action.NODE,
    tar.BLOCK_DEVICE: Action.NODE,
    tar.FIFO: Action.NODE,
}


_FILE = Action.FILE  # most entries are: here no look-up in an enumeration


class Rules:
    """The rules over one layer, whose entries `budget` counts."""

    def __init__(self, budget: Budget, *, name_bytes: int, whiteout_names: bool) -> None:
        self._budget = budget
        self._name_bytes = name_bytes
        self._whiteout_names = whiteout_names
        self._last = (b"", b"")  # the last entry's folder: the path as named, checked, and as meant
        self.xattrs_left_out = 0

    def operations(self, entries: Iterable[Entry]) -> Iterator[Operation]:
        """Yield what to do for each entry; Refused for one that breaks a rule."""
        for entry in entries:
            self._budget.entry()
            place = self._place(entry)
            if place is None:
                continue
            parent, name = place
            if name.startswith(WHITEOUT_PREFIX):
                operation = _marker(entry, parent, name)
            else:
                operation = self._operation(entry, parent, name)
            if operation is not None:
                yield operation

    def _place(self, entry: Entry) -> tuple[bytes, bytes] | None:
        """Return the place of an entry; None for the root's, and what means nothing here."""
        above, _, name = entry.name.rstrip(b"/").rpartition(b"/")
        is_odd = name in _ODD_PARTS or b"\0" in name
        if above == self._last[0] and not is_odd and len(name) <= self._name_bytes:
            return self._last[1], name  # as for most entries
        parts = _parts(entry.name)
        if not parts:
            _check_root(entry)
            return None
        self._check_parts(parts, entry.name)
        parent = b"/".join(parts[:-1])
        if b".wh..wh." in parent and not _AUFS_OWN.isdisjoint(parts[:-1]):
            return None
        if not is_odd:
            self._last = (above, parent)
        return parent, parts[-1]

    def check_folder_name(self, name: bytes) -> None:
        """Check the name of a folder: through a link, no entry needs to have named it."""
        if len(name) > self._name_bytes:
            raise self._too_long(name)
        if name in _AUFS_OWN:
            raise Refused(f"{printable(name)!r} is a folder of aufs's own")
        if name.startswith(WHITEOUT_PREFIX):
            self._check_folder_name(name, name)

    def _too_long(self, name: bytes) -> Refused:
        return Refused(f"{printable(name)!r} is over the {self._name_bytes} bytes that a name may have")

    def _check_parts(self, parts: list[bytes], name: bytes) -> None:
        if len(parts) > limits.PATH_DEPTH:
            raise Refused(f"{printable(name)!r} is over {limits.PATH_DEPTH} folders deep")
        # Most names are short and plain; one by one, deep ones would cost more than their bytes.
        if len(name) > self._name_bytes and len(max(parts, key=len)) > self._name_bytes:
            for part in (*parts[:-1], parts[-1].removeprefix(WHITEOUT_PREFIX)):
                if len(part) > self._name_bytes:
                    raise self._too_long(part)
        if WHITEOUT_PREFIX in name:
            for part in parts[:-1]:
                if part.startswith(WHITEOUT_PREFIX) and part not in _AUFS_OWN:
                    self._check_folder_name(part, name)

    def _check_folder_name(self, part: bytes, name: bytes) -> None:
        _check_hidden(part[len(WHITEOUT_PREFIX) :], name)
        if not self._whiteout_names:
            raise Refused(f"{printable(name)!r}: this backend cannot hold such a folder")

    def _operation(self, entry: Entry, parent: bytes, name: bytes) -> Operation:
        if entry.uid > _HIGHEST_ID or entry.gid > _HIGHEST_ID:
            raise Refused(f"{printable(entry.name)!r} has an owner out of range")
        if entry.xattrs:
            entry = msgspec.structs.replace(entry, xattrs=self._xattrs(entry))
        if not 0 <= entry.mtime <= _LATEST:
            entry = msgspec.structs.replace(entry, mtime=0)  # as containerd does
        if entry.size > limits.FILE:
            raise Refused(f"{printable(entry.name)!r} is over {limits.FILE} bytes large")
        action = _ACTIONS[entry.type]
        if action is _FILE:
            return Operation(action, parent, name, entry)
        if action is Action.HARDLINK:
            return Operation(action, parent, name, entry, self._link_target(entry))
        if action is Action.SYMLINK:
            _check_symlink(entry)
        elif action is Action.NODE:
            _check_node(entry)
        return Operation(action, parent, name, entry)

    def _link_target(self, entry: Entry) -> bytes:
        """Return a hard link's target; it is always meant from the root, whatever it begins with."""
        parts = _parts(entry.link) if entry.link else []
        if not parts or parts[-1].startswith(WHITEOUT_PREFIX):
            raise Refused(f"hard link {printable(entry.name)!r} has no target that it may have")
        self._check_parts(parts, entry.link)
        return b"/".join(parts)

    def _xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        held = sum(len(key) + len(value) for key, value in entry.xattrs.items())
        if len(entry.xattrs) > limits.XATTRS or held > limits.XATTR_BYTES:
            raise Refused(f"{printable(entry.name)!r} has too many or too large xattrs")
        kept = {key: value for key, value in entry.xattrs.items() if _keeps(entry, key, value)}
        if entry.type != tar.HARDLINK:  # they are its file's, with which they stand
            self.xattrs_left_out += len(entry.xattrs) - len(kept)
        return kept


def _parts(name: bytes) -> list[bytes]:
    """Return the components of a name as the root sees it: `..` stops at the root.

    Lexical and done once, so that no second reading can differ. Empty for the root itself.
    """
    if not name or b"\0" in name:
        raise Refused("layer has an entry without a name")
    parts = name.rstrip(b"/").split(b"/")
    if _ODD_PARTS.isdisjoint(parts):
        return parts
    parts = []
    last = b""
    for part in name.split(b"/"):
        if part in {b"", b"."}:
            continue
        last = part
        if part != b"..":
            parts.append(part)
        elif parts:
            parts.pop()
    if last == b"..":
        raise Refused(f"layer has an entry that ends in '..': {printable(name)!r}")
    return parts


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Return the parent and the last component of a normalised path."""
    parent, _, last = name.rpartition(b"/")
    return parent, last


def _check_root(entry: Entry) -> None:
    if entry.type != tar.DIRECTORY:
        raise Refused(f"layer would replace the root folder ({printable(entry.name)!r})")


def _marker(entry: Entry, parent: bytes, name: bytes) -> Operation | None:
    if name == _OPAQUE:
        if entry.type != tar.FILE:
            raise Refused(f"opaque marker in {printable(parent)!r} is not a regular file")
        return Operation(Action.OPAQUE, parent, name, entry)
    if name in _AUFS_OWN:
        return None
    hidden = name[len(WHITEOUT_PREFIX) :]
    _check_hidden(hidden, entry.name)
    # aufs makes whiteouts as hard links to each other, and old docker packed them so.
    if entry.type not in {tar.FILE, tar.HARDLINK}:
        raise Refused(f"whiteout {printable(entry.name)!r} is not a regular file")
    return Operation(Action.WHITEOUT, parent, hidden, entry)


def _check_hidden(hidden: bytes, name: bytes) -> None:
    if hidden in {b"", b".", b".."} or hidden.startswith(WHITEOUT_PREFIX):
        raise Refused(f"not a whiteout that means anything: {printable(name)!r}")


def _check_symlink(entry: Entry) -> None:
    if not entry.link or len(entry.link) > limits.LINK_TARGET or b"\0" in entry.link:
        raise Refused(f"symlink {printable(entry.name)!r} has an empty or overlong target")


def _check_node(entry: Entry) -> None:
    if entry.type == tar.FIFO:
        return
    if entry.major > _HIGHEST_MAJOR or entry.minor > _HIGHEST_MINOR:
        raise Refused(f"device {printable(entry.name)!r} has numbers out of range")
    if entry.type == tar.CHAR_DEVICE and not entry.major and not entry.minor:
        raise Refused(f"device {printable(entry.name)!r} is 0:0, an overlay whiteout in disguise")


def _keeps(entry: Entry, key: bytes, value: bytes) -> bool:
    """Say whether an xattr goes into the tree; the others are left out, counted and reported.

    trusted.* steers overlay and other layers of the host, as does user.overlay.*; security.* but
    capabilities, and system.* but ACLs, are the host's to decide.
    """
    if not key or len(key) > limits.NAME:
        raise Refused(f"{printable(entry.name)!r} has a malformed xattr name")
    if key == _CAPABILITY:
        return entry.type == tar.FILE and _is_capability(entry, value)
    if key in {acl.ACCESS, acl.DEFAULT}:
        return _is_acl(entry, value) and entry.type in _WITH_ACLS[key]
    if key.startswith(b"user."):
        on_file = entry.type in {tar.FILE, tar.DIRECTORY}  # the kernel allows no others (xattr(7))
        return on_file and len(key) > 5 and not key.startswith(b"user.overlay.")
    return False


def _is_acl(entry: Entry, value: bytes) -> bool:
    if acl.is_empty(value):
        return False
    if not acl.is_well_formed(value):
        raise Refused(f"{printable(entry.name)!r} has a malformed ACL")
    return True


def _is_capability(entry: Entry, value: bytes) -> bool:
    revision = int.from_bytes(value[:4], "little") & ~_CAPABILITY_EFFECTIVE
    if _CAPABILITY_SIZES.get(revision) != len(value):
        raise Refused(f"{printable(entry.name)!r} has malformed capabilities")
    # Revision 3 binds to a root user; one of another user namespace means nothing here.
    return len(value) != 24 or value[20:] == bytes(4)
