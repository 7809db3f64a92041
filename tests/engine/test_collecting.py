"""Collections in the background of an engine: on time, in bounded steps, ended with the engine."""

import fcntl
import os
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from engine.app import open_engine
from engine.content import discard
from engine.fs.removal import UNFINISHED
from engine.gc import collect as collecting
from engine.gc.activity import glance
from engine.gc.policy import Disk, Policy
from engine.gc.scheduler import Schedule
from engine.kv.schema import EXTENT, Lease, now
from engine.metadata import ledger
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.stores import Stores
from engine.times import rfc3339
from tests.command import lamina
from tests.engine.image_files import MANIFEST, records

pytestmark = pytest.mark.root

S = 10**9
EAGER = Schedule(pause_threshold=0.5, startup_delay=0.001)


def put(stores, data, labels=None, lease=""):
    with stores.content.ingest(f"put {digest_of(data)}", lease=lease) as writer:
        writer.write(data)
        return writer.commit(labels).digest


def blobs(stores):
    return {blob.digest for blob in stores.content.walk()}


async def until(condition):
    with trio.fail_after(30):
        while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110  no event tells of it
            await trio.sleep(0.005)


# -- steps --------------------------------------------------------------------------------------


def test_bytes_of_many_blobs_are_deleted_in_few_commits(stores, monkeypatch):
    with stores.root.meta.write() as meta, stores.root.blobs.write() as stored:
        for number in range(1, 301):
            stored.raw.put(number.to_bytes(8, "big") + bytes(4), b"bytes")
            discard.drop_bytes(meta, number)
    commits = []
    for environment in (stores.root.meta, stores.root.blobs):
        write = environment.write
        monkeypatch.setattr(environment, "write", lambda write=write: commits.append(1) or write())
    told = []
    stores.content.cleanup(report=lambda *about: told.append(about[2:]))
    with stores.root.blobs.read() as txn:
        assert txn.raw.stat()["entries"] == 0
    assert len(commits) == 10
    assert told == [(300, 64), (300, 128), (300, 192), (300, 256), (300, 300)]
    assert not records(stores)["trash"]


def test_folders_go_in_slices_of_time(stores, monkeypatch):
    backend = stores.snapshotter("copy")
    for number in range(5):
        backend.prepare(f"{number}")
        backend.remove(f"{number}")
    seconds, told = [], []
    clean = backend.cleanup

    def hurried(**options):
        seconds.append(options["seconds"])
        return clean(**options | {"seconds": -1 if len(seconds) < 3 else 60})

    monkeypatch.setattr(backend, "cleanup", hurried)
    monkeypatch.setattr(stores, "snapshotters", lambda: [backend])
    collected = stores.collect(report=lambda *about: told.append(about[1]))
    assert not collected.left
    assert seconds == [0.5, 1.0, 2.0]
    assert told.count("folders") == 3
    assert not list(stores.root.trash.iterdir())


def test_a_slice_ends_at_the_first_folder_that_is_not_finished(stores):
    backend = stores.snapshotter("copy")
    for number in range(3):
        backend.prepare(f"{number}")
        backend.remove(f"{number}")
    (left,) = backend.cleanup(seconds=-1)
    assert left.reason == UNFINISHED
    assert backend.cleanup() == []


_FLAGS = 0x40086602  # FS_IOC_SETFLAGS
_IMMUTABLE = 0x10


@contextmanager
def immutable(file):
    opened = os.open(file, os.O_RDONLY)
    try:
        fcntl.ioctl(opened, _FLAGS, struct.pack("l", _IMMUTABLE))
        yield
        fcntl.ioctl(opened, _FLAGS, struct.pack("l", 0))
    finally:
        os.close(opened)


def test_gc_21_ms_33_an_immutable_folder_stops_nothing_else(stores):
    """It is told of, and tried again."""
    backend = stores.snapshotter("copy")
    trees = []
    for number in range(3):
        (mount,) = backend.prepare(f"{number}")
        trees.append(Path(mount.source))
        (trees[-1] / "file").touch()
        backend.remove(f"{number}")
    garbage = put(stores, b"x" * 20_000)
    with immutable(trees[1] / "file"):
        for _ in range(2):
            collected = stores.collect()
            assert ["copy-2" in left.path for left in collected.left] == [True]
            assert "permitted" in collected.left[0].reason
            assert [path.name for path in stores.root.trash.iterdir()] == ["copy-2"]
    assert garbage not in blobs(stores)
    assert not stores.collect().left
    assert not list(stores.root.trash.iterdir())


def test_gc_22_after_all_is_gone_the_disk_is_as_it_was(stores):
    def disk():
        files = [path for path in stores.root.path.rglob("*") if path.name != "reserve"]
        return sum(path.lstat().st_blocks * 512 for path in files)

    sizes = []
    for _ in range(3):
        for number in range(12):
            put(stores, number.to_bytes(2, "big") * 100_000)
            stores.snapshotter("copy").prepare(f"{number}")
            stores.snapshotter("copy").remove(f"{number}")
        stores.collect()
        sizes.append(disk())
    assert max(sizes[1:]) - sizes[0] < 1 << 20


# -- on time ------------------------------------------------------------------------------------


def test_a_glance(stores):
    meta = stores.root.meta
    first = glance(meta, "default", 0)
    assert (first.expires, first.deletions) == (None, 0)
    again = glance(meta, "default", 0, first)
    assert again.at >= first.at
    assert again.transactions == first.transactions
    for name, seconds in (("a", 50), ("b", 30), ("c", 10)):
        about = {"containerd.io/gc.expire": rfc3339(seconds * S)}
        with meta.write() as txn:
            ledger.put(txn, "default", Lease(id=name, created=1, labels=about))
    seen = glance(meta, "default", 10 * S, again)
    assert (seen.transactions, seen.expires) == (first.transactions + 3, 30 * S)
    stores.leases.delete("a")
    stores.content.ingest("x", lease="").close()
    assert glance(meta, "default", 0, seen).deletions == 1
    assert glance(meta, "other", 0).deletions == 0


def test_every_deletion_by_a_user_is_counted(stores):
    held = put(stores, b"x" * 20_000)
    stores.images.put_all({"a": stores_target(stores, held), "b": stores_target(stores, held)})
    backend = stores.snapshotter("copy")
    backend.prepare("key")
    lease = stores.leases.create().id
    count = 0
    for delete in (
        lambda: stores.images.remove("a", "b"),
        lambda: backend.remove("key"),
        lambda: stores.leases.delete(lease),
        lambda: stores.remove_blob(held),
    ):
        delete()
        count += 1
        assert glance(stores.root.meta, "default", 0).deletions == count
    stores.collect()
    assert glance(stores.root.meta, "default", 0).deletions == count


def stores_target(stores, digest):
    return Descriptor(media_type=MANIFEST, digest=digest, size=stores.content.info(digest).size)


def test_what_expires_goes_though_nothing_else_happens(tmp_path):
    async def main():
        async with open_engine(tmp_path / "root", gc=EAGER) as engine:
            lease = await trio.to_thread.run_sync(lambda: engine.stores.leases.create(life=S // 5))
            held = put(engine.stores, b"held", lease=lease.id)
            await until(lambda: not blobs(engine.stores))
            assert now() - lease.created >= S // 5
            assert held not in blobs(engine.stores)

    trio.run(main)


def test_what_another_process_deletes_is_noticed(tmp_path):
    root = tmp_path / "root"

    async def main():
        async with open_engine(root, gc=EAGER) as engine:
            digest = put(engine.stores, b"held", {"containerd.io/gc.root": "x"})
            engine.stores.images.put_all({"a": stores_target(engine.stores, digest)})
            engine.stores.content.update(digest, {"containerd.io/gc.root": ""})
            await trio.to_thread.run_sync(lambda: lamina(root, "image", "rm", "a", cwd="/"))
            await until(lambda: not blobs(engine.stores))

    trio.run(main)


def test_an_engine_that_was_asked_shares_its_schedule(tmp_path):
    async def main():
        idle = Schedule(pause_threshold=0, startup_delay=0, mutation_threshold=0)
        async with open_engine(tmp_path / "root", gc=idle) as engine:
            garbage = put(engine.stores, b"garbage")
            collected = []

            async def ask():
                collected.append(await engine.collect())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                nursery.start_soon(ask)
            assert collected[0].blobs == [garbage]
            assert collected[0] is collected[1]

    trio.run(main)


def test_ms_37_an_engine_with_a_policy_removes_images(tmp_path, monkeypatch):
    full = Disk(1000, 10)
    monkeypatch.setattr(Stores, "disk", lambda _stores: full)

    async def main():
        schedule = Schedule(startup_delay=0.001, policy=Policy(min_age=0))
        async with open_engine(tmp_path / "root", gc=schedule) as engine:
            digest = put(engine.stores, b"x", {"containerd.io/gc.root": "x"})
            engine.stores.images.put_all({"a": stores_target(engine.stores, digest)})
            engine.stores.content.update(digest, {"containerd.io/gc.root": ""})
            assert (await engine.collect()).blobs == [digest]
            assert not engine.stores.images.walk()
            assert not blobs(engine.stores)

    trio.run(main)


# -- the end ------------------------------------------------------------------------------------


@contextmanager
def held_at(monkeypatch, module, point):
    """Let a collection come to a point and stay there until it is cancelled."""
    reached = threading.Event()

    def hit(name):
        if name == point:
            reached.set()
            while True:
                trio.from_thread.check_cancelled()
                time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr(module, "hit", hit)
        yield reached


@pytest.mark.parametrize(
    ("module", "point"),
    [(collecting, "gc.marked"), (collecting, "gc.swept"), (discard, "trash.emptied")],
)
def test_gc_24_closing_an_engine_ends_its_collection_cleanly(tmp_path, monkeypatch, module, point):
    root = tmp_path / "root"

    async def main():
        async with open_engine(root, gc=Schedule(startup_delay=0)) as engine:
            garbage = put(engine.stores, b"x" * (EXTENT + 1))
            with held_at(monkeypatch, module, point) as reached:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(engine.collect)
                    await until(reached.is_set)
                    nursery.cancel_scope.cancel()  # who asked goes, the collection does not
            return garbage

    garbage = trio.run(main)

    async def after():
        async with open_engine(root) as engine:
            found = records(engine.stores)
            assert not found["marks"]
            assert not found["touched"]
            collected = await engine.collect()
            assert (collected.blobs == [garbage]) == (point == "gc.marked")
            assert not records(engine.stores)["trash"]

    trio.run(after)
