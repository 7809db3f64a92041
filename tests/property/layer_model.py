"""The reference model of layers: what a stack of them means, as plainly as it can be said.

A layer is applied to an empty tree, then merged onto the tree below. No system call, no backend.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass, field

from engine.testing.trees import TreeEntry

TYPES = {"0": stat.S_IFREG, "2": stat.S_IFLNK, "5": stat.S_IFDIR, "6": stat.S_IFIFO}
LINKS_FOLLOWED = 255


class Impossible(Exception):
    """The layer breaks a rule; every backend must refuse it."""


@dataclass(frozen=True)
class Member:
    """An entry of a layer as the test made it; `kind` is the type flag of tar."""

    path: tuple[bytes, ...]
    kind: str
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    mtime: int = 0
    data: bytes = b""
    link: bytes = b""
    note: bytes = b""


@dataclass(eq=False)
class File:
    """Anything but a folder; two names of one file share the object."""

    member: Member


@dataclass(eq=False)
class Folder:
    """A folder; `member` is None while only something within it was named."""

    parent: Folder | None
    member: Member | None = None
    names: dict[bytes, File | Folder] = field(default_factory=dict)
    hidden: set[bytes] = field(default_factory=set)
    opaque: bool = False


def apply(members: list[Member]) -> Folder:
    """Return the tree of one layer alone."""
    root = Folder(None)
    for member in members:
        _apply_one(root, member)
    return root


def _apply_one(root: Folder, member: Member) -> None:
    *parents, name = member.path
    folder = root
    for part in parents:
        folder = _enter(root, folder, part, make=True)
    if name == b".wh..wh..opq":
        folder.opaque = True
    elif name.startswith(b".wh."):
        folder.hidden.add(name[4:])
    elif member.kind == "5":
        old = folder.names.get(name)
        if not isinstance(old, Folder):
            old = folder.names[name] = Folder(folder)
        old.member = member
    elif member.kind == "1":
        folder.names[name] = _link_target(root, member)
    else:
        folder.names[name] = File(member)


def _enter(root: Folder, folder: Folder, name: bytes, *, make: bool) -> Folder:
    pending, followed = [name], 0
    while pending:
        part = pending.pop()
        if part == b"..":
            folder = folder.parent or root
            continue
        found = folder.names.get(part)
        if found is None:
            if not make:
                raise Impossible
            found = folder.names[part] = Folder(folder)
        if isinstance(found, Folder):
            folder = found
            continue
        if found.member.kind != "2" or followed == LINKS_FOLLOWED:
            raise Impossible
        followed += 1
        if found.member.link.startswith(b"/"):
            folder = root
        pending += [p for p in reversed(found.member.link.split(b"/")) if p not in (b"", b".")]
    return folder


def _link_target(root: Folder, member: Member) -> File:
    *parents, name = member.link.split(b"/")
    folder = root
    for part in parents:
        folder = _enter(root, folder, part, make=False)
    target = folder.names.get(name)
    if not isinstance(target, File):
        raise Impossible
    return target


def merge(below: Folder, layer: Folder, *, covers: bool = False) -> Folder:
    """Return the tree of `layer` on top of `below`, of which nothing shows where it `covers`.

    A folder that the layer only implies is what it is below, also where its contents are hidden.
    """
    merged = Folder(None, layer.member or below.member)
    covers = covers or layer.opaque
    for name, node in below.names.items():
        if not covers and name not in layer.hidden and name not in layer.names:
            merged.names[name] = node
    for name, own in layer.names.items():
        if isinstance(own, Folder):
            under = below.names.get(name)
            under = under if isinstance(under, Folder) else Folder(None)
            merged.names[name] = merge(under, own, covers=covers or name in layer.hidden)
        else:
            merged.names[name] = own
    return merged


def describe(tree: Folder) -> dict[bytes, TreeEntry]:
    """Return the tree as `read_tree` would."""
    places: dict[bytes, File | Folder] = {}
    _collect(tree, b"", places)
    groups: dict[int, list[bytes]] = {}
    for path, node in places.items():
        groups.setdefault(id(node), []).append(path)
    return {path: _entry(path, node, groups[id(node)]) for path, node in places.items()}


def _collect(folder: Folder, at: bytes, places: dict[bytes, File | Folder]) -> None:
    for name, node in folder.names.items():
        path = at + b"/" + name if at else name
        places[path] = node
        if isinstance(node, Folder):
            _collect(node, path, places)


def _entry(path: bytes, node: File | Folder, group: list[bytes]) -> TreeEntry:
    member = node.member or Member((), "5", 0o755)
    is_file = member.kind == "0"
    detail = ""
    if is_file:
        detail = hashlib.sha256(member.data).hexdigest()
    elif member.kind == "2":
        detail = repr(member.link)
    return TreeEntry(
        mode=TYPES[member.kind] | (0o777 if member.kind == "2" else member.mode),
        owner=member.owner,
        size=len(member.data) if is_file else 0,
        mtime=member.mtime * 1_000_000_000,
        detail=detail,
        links=tuple(sorted(name for name in group if name != path)),
        xattrs=(("user.note", member.note),) if member.note else (),
    )
