"""What every hostile layer is tried with: a small world outside the store, and what must hold after.

A row stands for one attack; its inputs are layers, and either the error that must come or the exact
tree. The rows are in `rows_*.py`, one file for each table of the attack catalogue.
"""

import hashlib
import os
import re
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError, Refused
from engine.snapshots import Kind, Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.testing.trees import TreeEntry
from tests.support import apply_stack, tree_of

UP = "../" * 5
"""From a layer's own folder up to the folder that holds the store and the victims."""

Shape = tuple[object, ...]
Tree = Mapping[str | bytes, Shape]


# -- members ----------------------------------------------------------------------------------


def D(name: bytes | str, mode: int = 0o755, **more: Any) -> bytes:  # noqa: N802  as tables write it
    return member(name, "5", mode=mode, **more)


def F(name: bytes | str, data: bytes = b"", **more: Any) -> bytes:  # noqa: N802
    return member(name, "0", data, **more)


def S(name: bytes | str, target: bytes | str, **more: Any) -> bytes:  # noqa: N802
    return member(name, "2", link=target, **more)


def H(name: bytes | str, target: bytes | str, **more: Any) -> bytes:  # noqa: N802
    return member(name, "1", link=target, **more)


def X(name: bytes | str, data: bytes = b"", **xattrs: bytes) -> bytes:  # noqa: N802
    """A file with xattrs; a double underscore in a keyword stands for a dot."""
    return F(name, data, pax={xattr(key.replace("__", ".")): value for key, value in xattrs.items()})


def xattr(key: str) -> bytes:
    return b"SCHILY.xattr." + key.encode()


# -- expected trees ---------------------------------------------------------------------------


def folder(mode: int = 0o755, owner: tuple[int, int] = (0, 0), **xattrs: bytes) -> Shape:
    return ("folder", "", mode, owner, (), _keys(xattrs))


def file(
    data: bytes = b"",
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    links: Sequence[str] = (),
    **xattrs: bytes,
) -> Shape:
    names = tuple(name.encode() for name in links)
    return ("file", hashlib.sha256(data).hexdigest(), mode, owner, names, _keys(xattrs))


def link(target: str, links: Sequence[str] = (), owner: tuple[int, int] = (0, 0)) -> Shape:
    names = tuple(name.encode() for name in links)
    return ("link", repr(os.fsencode(target)), 0o777, owner, names, ())


def node(kind: str, numbers: str = "", mode: int = 0o644) -> Shape:
    return (kind, numbers, mode, (0, 0), (), ())


def _keys(xattrs: Mapping[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((key.replace("__", "."), value) for key, value in xattrs.items()))


_NAMES = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}


def shape(entry: TreeEntry) -> Shape:
    """Return an entry as rows write it: without its times, which are compared between backends."""
    kind = _NAMES.get(stat.S_IFMT(entry.mode), "other")
    detail = entry.detail
    return (kind, detail, stat.S_IMODE(entry.mode), entry.owner, entry.links, entry.xattrs)


def folders_above(path: str) -> dict[str | bytes, Shape]:
    """Return the implied folders on the way to `path`, all of them 0755 0:0."""
    parts = path.strip("/").split("/")
    return {"/".join(parts[:end]): folder() for end in range(1, len(parts))}


# -- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails:
    """The error that must come, and at which layer: those below it stay committed."""

    says: str
    kind: type[EngineError] = Refused
    layer: int = -1


@dataclass(frozen=True)
class Input:
    """Layers and what must come of them; both may depend on where the victims are."""

    layers: "Sequence[Sequence[bytes] | bytes] | Callable[[World], Sequence[Sequence[bytes] | bytes]]"
    expect: "Fails | Tree | Callable[[World], Tree]"
    aufs: Fails | None = None
    """What aufs alone refuses: its markers are names, so that some names cannot be held there."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Bounds of `engine.limits`, lowered so that the test is fast."""


@dataclass(frozen=True)
class Row:
    """One attack of the catalogue, by its ID."""

    id: str
    why: str
    inputs: Mapping[str, Input]


class World:
    """What lies outside the store: a victim, a folder whose name begins as the store's, and others."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.victim = top / "victim"
        for name in ("victim", "rootx", "cwd"):
            folder_path = top / name
            folder_path.mkdir()
            (folder_path / "hello").write_bytes(b"outside\n")
            (folder_path / "hello").chmod(0o640)
            os.setxattr(folder_path / "hello", "user.mark", b"outside")
        os.mkfifo(top / "fifo")
        with socket.socket(socket.AF_UNIX) as unix:
            here = os.open(top, os.O_PATH)
            try:
                # Through the descriptor, because a socket's path may only have 107 bytes.
                unix.bind(f"/proc/self/fd/{here}/socket")
            finally:
                os.close(here)
        self._before = self._look()

    def _paths(self) -> list[Path]:
        folders = [self.top / name for name in ("victim", "rootx", "cwd")]
        inside = [path for folder_path in folders for path in sorted(folder_path.iterdir())]
        return [*folders, *inside, self.top / "fifo", self.top / "socket"]

    def _look(self) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for path in self._paths():
            info = path.lstat()
            # ctime too: it tells of a change that was changed back.
            facts = (info.st_ino, info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size)
            times = (info.st_mtime_ns, info.st_ctime_ns)
            xattrs = [(key, os.getxattr(path, key)) for key in os.listxattr(path)]
            content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            found[str(path)] = (*facts, *times, xattrs, content)
        return found

    def check_untouched(self, store: Path) -> None:
        """Check that nothing outside changed, and that no file outside has a name in the store."""
        assert self._look() == self._before
        outside = {facts[0] for facts in self._before.values()}
        for _, folders, files, here in os.fwalk(store):
            for name in folders + files:
                assert os.lstat(name, dir_fd=here).st_ino not in outside, name


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def expected(case: Input, backend: str, world: World) -> Fails | dict[bytes, Shape]:
    """Return what must come of an input on one backend."""
    if backend == "aufs" and case.aufs is not None:
        return case.aufs
    if isinstance(case.expect, Fails):
        return case.expect
    tree = case.expect(world) if callable(case.expect) else case.expect
    return {os.fsencode(name): entry for name, entry in tree.items()}


def layers_of(case: Input, world: World) -> list[bytes]:
    layers = case.layers(world) if callable(case.layers) else case.layers
    return [layer if isinstance(layer, bytes) else archive(*layer) for layer in layers]


def check_failure(backend: Snapshotter, layers: Sequence[bytes], fails: Fails) -> None:
    """Check that the right error comes and that only the layers below the bad one are left."""
    with pytest.raises(EngineError) as caught:
        apply_stack(backend, layers)
    assert type(caught.value) is fails.kind, repr(caught.value)
    assert re.search(fails.says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    left = list(backend.walk())
    assert len(left) == range(len(layers))[fails.layer]
    assert all(info.kind == Kind.COMMITTED for info in left)


def check_store(stores: Stores, backend: Snapshotter) -> None:
    """Check that there is one folder for each snapshot, and nothing on its way out."""
    folders = list((stores.root.snapshots / backend.name).iterdir())
    assert len(folders) == len(list(backend.walk()))
    assert list(stores.root.trash.iterdir()) == []


def run(case: Input, backend_name: str, stores: Stores, world: World) -> None:
    """Apply an input on one backend and check all that must hold after it."""
    backend = stores.snapshotter(backend_name)
    outcome = expected(case, backend_name, world)
    layers = layers_of(case, world)
    before = descriptors()
    if isinstance(outcome, Fails):
        check_failure(backend, layers, outcome)
    else:
        top = apply_stack(backend, layers)
        assert len(list(backend.walk())) == len(layers)
        tree = tree_of(stores, backend_name, top, world.top / "mnt")
        assert {name: shape(entry) for name, entry in tree.items()} == outcome
    assert descriptors() == before, "left descriptors open"
    check_store(stores, backend)
    world.check_untouched(stores.root.path)
