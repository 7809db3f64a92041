"""Collections and checks beside real work: files being made, trees in use, a lock that is short."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path

import pytest
import trio

from engine.app import Engine
from engine.fsck.blobs import orphaned_bytes
from engine.fsck.findings import Counts
from engine.fsck.folders import orphaned_folders
from engine.fsck.records import read_records
from engine.gc import collect as collecting
from engine.images.states import parts_of
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, COUNTERS, Blob
from engine.metadata import ledger
from engine.mount import mounted
from engine.oci.digest import digest_of
from engine.root import Root
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import read_tree
from engine.unpack.workshop import open_workshop
from tests.conftest import AMD64
from tests.filesystems import in_memory
from tests.inline import workers_inline
from tests.meddling import meddled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

_BASE = archive(member("base/file", data=b"base"), member("base/other"))


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Stores in memory, whose workers are threads."""
    with in_memory(tmp_path / "memory") as memory, Root(memory / "root") as root:
        assert root.owners.me.id
        opened = Stores(root, "default", AMD64)
        opened.snapshotter("overlay")
        with workers_inline(monkeypatch, root):
            yield opened
        opened.close()


def image(tmp_path: Path, name: str) -> Path:
    return layout(tmp_path / name, [_BASE, archive(member(name), member("base/.wh.other"))])


def run(stores: Stores, work: Callable[[Engine], object]) -> None:
    async def main() -> None:
        async with open_workshop(stores.root) as workshop:
            await work(Engine(stores, workshop))  # type: ignore[misc]

    trio.run(main)


def bring(stores: Stores, source: Path) -> None:
    run(stores, lambda engine: engine.import_image(source, name=source.name, snapshotter="overlay"))


def test_gc_15_what_is_being_made_belongs_to_somebody(stores, tmp_path, monkeypatch):
    """Whenever one looks, no bytes and no folder of work under way are orphans."""
    source = image(tmp_path, "one")
    found = []

    def look(number: int) -> None:
        if number % 2:
            read = read_records(stores.root.meta, Counts())
            orphans = (orphaned_bytes(stores.root, read.numbers), orphaned_folders(stores.root, read))
            findings = (trouble.finding for trouble in chain(read.troubles, *orphans))
            found.extend(finding for finding in findings if finding.is_damage)
        else:
            stores.collect()

    with meddled(monkeypatch, stores.root.meta, look) as passed:
        bring(stores, source)
    assert len(passed) > 20
    assert found == []
    assert parts_of(stores, stores.resolve(stores.images.get("one").target)).unpacked


def test_p4_a_collection_changes_no_tree_in_use(stores, tmp_path):
    for name in ("one", "two"):
        bring(stores, image(tmp_path, name))
    top = parts_of(stores, stores.resolve(stores.images.get("one").target)).unpacked["overlay"]
    mounts = stores.snapshotter("overlay").view("in use", top)
    (tmp_path / "target").mkdir()
    with mounted(mounts, tmp_path / "target"):
        before = read_tree(tmp_path / "target")
        stores.images.remove("one", "two")
        collected = stores.collect()
        assert collected.blobs
        assert len(collected.snapshots) == 1
        assert read_tree(tmp_path / "target") == before
    stores.release("in use")
    assert len(stores.collect().snapshots) == 2


def test_p12_gc_18_a_slice_is_short_and_no_file_is_deleted_in_it(stores, tmp_path, monkeypatch):
    bring(stores, image(tmp_path, "one"))
    with stores.root.meta.write() as txn:
        for number in range(600):
            _put(txn, digest_of(b"%d" % number))
    stores.images.remove("one")
    left: list[int] = []

    def count(_: int) -> None:
        with stores.root.meta.read() as txn:
            left.append(len(BLOBS.scan(txn, stores.namespace)))

    with (
        _no_deletion_within_a_write(monkeypatch, stores.root.meta) as deleted,
        meddled(monkeypatch, stores.root.meta, count),
    ):
        collected = stores.collect()
    assert len(collected.blobs) == 604
    assert max(before - after for before, after in pairwise(left)) <= 256
    assert collecting._SLICE_S <= 0.05
    assert deleted


def _put(txn: Transaction, digest: str) -> None:
    number = COUNTERS.next(txn, "blob")
    ledger.put(txn, "default", Blob(digest=digest, number=number, size=1, created=1, updated=1))


@contextmanager
def _no_deletion_within_a_write(
    monkeypatch: pytest.MonkeyPatch, meta: Environment
) -> Iterator[list[str]]:
    """Fail where files are renamed or deleted in a write transaction; give what was called."""
    write = Environment.write
    deep = 0
    seen: list[str] = []

    @contextmanager
    def counted(self: Environment) -> Iterator[Transaction]:
        nonlocal deep
        with write(self) as txn:
            deep += self is meta
            try:
                yield txn
            finally:
                deep -= self is meta

    def watched(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> None:
            assert not deep, f"os.{name} within a write transaction"
            seen.append(name)
            real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "write", counted)
        for name in ("unlink", "rmdir", "rename", "replace"):
            patch.setattr(os, name, watched(name))
        yield seen
