"""Checks what killed commands leave: the steps that all crash tests share."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from engine.app import Engine, open_engine
from engine.images.states import parts_of
from engine.kv.schema import INLINE
from engine.oci.digest import parse_digest
from engine.snapshots import Kind
from engine.stores import Stores, host_platform, open_stores
from engine.testing.trees import TreeEntry, differences
from tests.command import dump
from tests.inline import workers_inline
from tests.support import tree_of

__all__ = ["Case", "again", "assert_nothing_half_done", "assert_tree", "collect_all"]

_NAME = "image:latest"


@dataclass(frozen=True)
class Case:
    """What a session prepares once: an image, a root that has it, its tree, how much commands write."""

    layout: Path
    imported: Path
    unpacked: Path
    tree: dict[bytes, TreeEntry]
    growth: dict[str, int]

    def arguments(self, command: str, backend: str | None = None) -> list[str]:
        """Return the words of a command on this image; without a backend it has to find the best."""
        chosen = ["--snapshotter", backend] if backend else []
        return {
            "import": ["import", str(self.layout), *chosen],
            "unpack": ["unpack", _NAME, *chosen],
            "gc": ["gc"],
        }[command]

    def template(self, command: str) -> Path | None:
        """Return the root that a command starts from, None for an empty one."""
        return {"import": None, "unpack": self.imported, "gc": self.unpacked}[command]


def assert_nothing_half_done(root: Path, *, named: bool) -> None:
    """Check a store after a crash: names are whole, and a collection leaves only what they hold.

    `named` says whether an image is there for certain, as the killed command did not make it.
    """
    with open_stores(root, "default", host_platform()) as stores:
        images = stores.images.walk()
        assert len(images) == 1 if named else len(images) < 2
        if images:
            _assert_whole(stores, unpacked=not named)
        collected = stores.collect()
        if images:
            assert not collected.blobs, "a named image lost content"
        infos = [info for backend in stores.snapshotters() for info in backend.walk()]
        assert all(info.kind is Kind.COMMITTED for info in infos), infos
    left = dump(root)
    for table in ("ingests", "leases", "lease_items", "trash"):
        assert left[table] == [], table
    assert len(left["folders"]) == len(left["snapshots"]), left["folders"]
    extents = {int.from_bytes(key[:8], "big") for key, _ in left["extents"]}
    apart = {blob["number"] for blob in left["blobs"] if blob["size"] > INLINE}
    assert apart <= extents <= {blob["number"] for blob in left["blobs"]}
    assert len(left["blobs"]) == len(extents) + len(left["small"])


def _assert_whole(stores: Stores, *, unpacked: bool) -> None:
    image = stores.resolve(stores.images.get(_NAME).target)
    for part in (*image.path, image.manifest.config, *image.manifest.layers):
        stores.content.verify(parse_digest(part.digest))
    tops = parts_of(stores, image).unpacked
    assert tops or not unpacked, "a name came before its image was unpacked"
    for backend, top in tops.items():
        assert stores.snapshotter(backend).stat(top).kind is Kind.COMMITTED


def again(root: Path, case: Case, command: str, backend: str = "overlay") -> None:
    """Run a killed command again, in this process, and check the tree that comes of it."""

    async def work(engine: Engine) -> None:
        if command == "import":
            await engine.import_image(case.layout, snapshotter=backend)
        else:
            await engine.unpack(_NAME, snapshotter=backend)

    async def opened() -> None:
        async with open_engine(root) as engine:
            # Processes of their own would take most of the time and show no more.
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await work(engine)

    before = os.umask(0)
    try:
        trio.run(opened)
    finally:
        os.umask(before)
    assert_tree(root, case, backend)


def assert_tree(root: Path, case: Case, backend: str) -> None:
    """Check that the image is unpacked, entry by entry."""
    with open_stores(root, "default", host_platform()) as stores:
        top = parts_of(stores, stores.resolve(stores.images.get(_NAME).target)).unpacked[backend]
        found = tree_of(stores, backend, top, root.with_name("mnt"))
    assert found == case.tree, "\n".join(differences(found, case.tree))


def collect_all(root: Path) -> None:
    """Remove every name, collect, and check that nothing is left on disk."""
    with open_stores(root, "default", host_platform()) as stores:
        for image in stores.images.walk():
            stores.images.remove(image.name)
        stores.collect()
    left = {table: records for table, records in dump(root).items() if records}
    assert left == {}
