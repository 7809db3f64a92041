"""What the checks of the conformance suite are put together from.

Sync; needs root, as mounts do. Free of any test framework.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.diff.apply import apply_layer
from engine.diff.compare import compare_layer
from engine.errors import EngineError
from engine.mount import Mount, mounted
from engine.oci.digest import digest_of
from engine.snapshots import Commit, Snapshotter
from engine.testing.archives import archive, member
from engine.testing.trees import TreeEntry, read_tree

__all__ = ["SuitePieces", "raises"]


@contextmanager
def raises(kind: type[EngineError]) -> Iterator[None]:
    """Fail unless the block raises an error of exactly this kind or a special case of it."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


class SuitePieces:
    """Layers applied to a backend, and what they look like."""

    def __init__(self, make: Callable[[], Snapshotter], folder: Path) -> None:
        """Mount below `folder`."""
        self._make = make
        self._target = folder / "mnt"
        self._backend = make()

    @contextmanager
    def _mounted(self, mounts: list[Mount]) -> Iterator[Path]:
        with mounted(mounts, self._target) as tree:
            yield tree

    def _layer(self, name: str, parent: str, *members: bytes) -> None:
        """Commit a layer that is applied directly, rebased where the backend can."""
        self._applied(f"new {name}", parent, *members)
        self._backend.commit(Commit(name=name, key=f"new {name}", parent=parent or None))

    def _applied(self, key: str, parent: str, *members: bytes) -> None:
        data = archive(*members)
        self._backend.prepare(key, "" if self._backend.capabilities.rebase else parent)
        mask = os.umask(0)
        try:
            apply_layer([data], self._backend.sink(key), diff_id=digest_of(data))
        finally:
            os.umask(mask)

    def _verified(self, name: str, parent: str, *members: bytes) -> str:
        """Commit a layer whose diff ID is verified, reusing it where it can be; return the diff ID."""
        backend, diff_id = self._backend, digest_of(archive(*members))
        if backend.reuse(f"new {name}", diff_id) is None:
            self._applied(f"new {name}", parent, *members)
        step = Commit(name=name, key=f"new {name}", parent=parent or None, diff_id=diff_id)
        backend.commit(step)
        return diff_id

    def _differing(self, name: str, *members: bytes) -> list[str]:
        """Return the paths at which a committed snapshot differs from a layer."""
        data = archive(*members)
        came = compare_layer([data], self._backend.comparing(name), diff_id=digest_of(data))
        return [difference.path for difference in came.differences]

    def _contents(self, name: str) -> Mapping[bytes, str]:
        """Return names and hashes of a committed snapshot's tree."""
        mounts = self._backend.view("contents", name)
        with self._mounted(mounts) as tree:
            found = {path: entry.detail for path, entry in read_tree(tree).items()}
        self._backend.remove("contents")
        return found

    def _tree(self, name: str) -> Mapping[bytes, TreeEntry]:
        """Return a committed snapshot's tree."""
        with self._mounted(self._backend.view("tree", name)) as tree:
            found = read_tree(tree)
        self._backend.remove("tree")
        return found

    def _base(self) -> None:
        self._layer(
            "base",
            "",
            member("folder/", "5", mode=0o750, uid=7, gid=8),
            member("folder/file", data=b"base"),
            member("folder/other", data=b"other"),
            member("top", data=b"top"),
        )
