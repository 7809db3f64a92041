"""One root in one process: opened as often as it is asked for, shared, and read without writing."""

import os
import threading

import pytest
import trio

from engine.app import open_engine
from engine.content.ingests import BeingWritten
from engine.errors import FailedPrecondition, NotFound, PermissionDenied
from engine.kv.schema import EXTENT
from engine.metadata.leases import leased
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root, open_root
from engine.stores import open_stores

HOST = Platform(os="linux", architecture="amd64")


def put(stores, data: bytes) -> str:
    with stores.content.ingest(f"put {digest_of(data)}", lease="") as writer:
        writer.write(data)
        return writer.commit().digest


def listed(folder) -> dict[str, tuple[int, int]]:
    """Return what a write would change: sizes and times of all files but LMDB's table of readers."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
        if path.name != "lock.mdb"
    }


def test_two_engines_with_different_namespaces(tmp_path):
    async def work() -> None:
        async with open_engine(tmp_path / "root", namespace="one") as one:
            async with open_engine(tmp_path / "root", namespace="two") as two:
                assert one.stores.root is two.stores.root
                put(one.stores, b"data")
                assert not list(two.stores.content.walk())
                put(two.stores, b"data")
            assert len((await one.collect()).blobs) == 1

    trio.run(work)


def test_the_last_one_closes(tmp_path):
    (tmp_path / "link").symlink_to("root")
    with open_stores(tmp_path / "root", "default", HOST) as one:
        with open_stores(tmp_path / "link", "default", HOST) as two:
            assert one.root is two.root
        digest = put(one, b"data")
    before = len(os.listdir("/proc/self/fd"))
    with Root(tmp_path / "root") as alone:  # nobody has it open any more
        assert alone is not one.root
        assert os.listdir(alone.path / "owners") == []
    with open_stores(tmp_path / "root", "default", HOST) as again:
        assert again.content.verify(digest) == 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_ingest_is_one_writers_whoever_opened_the_root(tmp_path):
    with open_stores(tmp_path / "root", "default", HOST) as one:
        with open_stores(tmp_path / "root", "default", HOST) as two:
            writer = one.content.ingest("x", lease="")
            with pytest.raises(BeingWritten, match="this process"):
                two.content.ingest("x", lease="")
            writer.close()
            two.content.ingest("x", lease="").close()
        with open_stores(tmp_path / "root", "other", HOST) as other, one.content.ingest("x", lease=""):
            other.content.ingest("x", lease="").close()


def test_threads_that_open_and_close_one_root(tmp_path):
    failures = []

    def work(name: str) -> None:
        try:
            for number in range(20):
                with open_stores(tmp_path / "root", name, HOST) as stores:
                    put(stores, f"{name} {number}".encode())
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number in range(4):
        with open_stores(tmp_path / "root", f"n{number}", HOST) as stores:
            assert len(list(stores.content.walk())) == 20


def test_a_root_that_took_anothers_place_is_another(tmp_path):
    with open_root(tmp_path / "root") as one:
        (tmp_path / "root").rename(tmp_path / "away")
        with open_root(tmp_path / "root") as two:
            assert one is not two
        with open_root(tmp_path / "away") as same:
            assert one is same


def test_nobody_writes_to_a_root_that_is_open_to_read(tmp_path):
    Root(tmp_path / "root").close()
    with open_root(tmp_path / "root", readonly=True) as reading:
        with open_root(tmp_path / "root", readonly=True) as also:
            assert also is reading
        writing = open_root(tmp_path / "root")
        with pytest.raises(FailedPrecondition, match="read-only in this process"):
            writing.__enter__()
    with open_root(tmp_path / "root") as writing, open_root(tmp_path / "root", readonly=True) as also:
        assert also is writing


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [[], ["root"], ["root", "root/lost+found"]])
def test_there_is_no_store_to_read(tmp_path, made):
    for name in made:
        (tmp_path / name).mkdir()
    with pytest.raises(NotFound, match=r"no store at .*/root; `lamina import` makes one"):
        Root(tmp_path / "root", readonly=True)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == made


@pytest.mark.parametrize("absent", ["snapshots", "meta.lmdb", "meta.lmdb/data.mdb"])
def test_a_store_whose_maker_died_is_none_to_read(tmp_path, absent):
    Root(tmp_path / "root").close()
    (tmp_path / "root" / "blobs.lmdb" / "data.mdb").unlink()  # it is made last
    (tmp_path / "root" / absent).rename(tmp_path / "away")
    with pytest.raises(NotFound):
        Root(tmp_path / "root", readonly=True)


def test_a_store_from_before_there_were_owners_can_be_read(tmp_path):
    Root(tmp_path / "root").close()
    (tmp_path / "root" / "owners").rmdir()
    with open_stores(tmp_path / "root", "default", HOST, readonly=True) as stores:
        assert stores.collect(dry_run=True).errors == []
    with Root(tmp_path / "root") as root:
        assert root.owners.is_alive(root.owners.me.id)


def test_reading_changes_nothing(tmp_path):
    with open_stores(tmp_path / "root", "default", HOST) as stores:
        digest = put(stores, bytes(EXTENT + 1))
    (tmp_path / "root").chmod(0o750)
    (tmp_path / "root" / "reserve").unlink()
    before = listed(tmp_path / "root")
    with open_stores(tmp_path / "root", "default", HOST, readonly=True) as stores:
        assert stores.content.verify(digest) == EXTENT + 1
        assert stores.images.walk() == []
        assert list(stores.snapshotter("overlay").walk()) == []
        assert stores.collect(dry_run=True).blobs == [digest]
        with pytest.raises(PermissionDenied), leased(stores.root.meta, "default"):
            pass
    after = listed(tmp_path / "root")
    assert {path for path in before if before[path] != after[path]} <= {
        str(tmp_path / "root" / "owners")
    }
    assert before.keys() == after.keys()


def test_a_slow_reader_holds_no_page_back(stores):
    """No slot of LMDB's table of readers has a transaction while a piece is in someone's hands."""
    digest = put(stores, bytes(3 * EXTENT))
    for reader in (stores.content.read(digest), stores.content.read_verified(digest)):
        next(reader)
        assert not stores.root.blobs.readers()
        reader.close()
    with stores.root.blobs.read():
        assert stores.root.blobs.readers()  # which is what it would look like


def test_a_collection_during_a_read_is_no_damage(stores):
    digest = put(stores, bytes(3 * EXTENT))
    reader = stores.content.read_verified(digest)
    next(reader)
    stores.collect()
    stores.content.cleanup()
    assert sum(map(len, reader)) == 2 * EXTENT
    with pytest.raises(NotFound):
        stores.content.info(digest)


@pytest.mark.parametrize(("free", "held"), [(0, 0), (16, 1), (256, 16), (1 << 20, 4096)])
def test_the_reserve_is_a_small_part_of_what_is_free(tmp_path, monkeypatch, free, held):
    """In KiB: less than what is needed to make the rest of a store where there is little."""

    class Disk:
        f_bavail, f_frsize = free, 1024

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    Root(tmp_path / "root").close()
    reserve = tmp_path / "root" / "reserve"
    assert (reserve.stat().st_size if reserve.exists() else 0) == held << 10
