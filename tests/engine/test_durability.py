"""The order of durable steps is the one that docs/on-disk.md promises, operation by operation."""

import errno
import os
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
import trio

from engine import doubts
from engine.app import Engine
from engine.archive.intake import Nobody
from engine.callables import named
from engine.compacting import compact_store
from engine.content.growing import BATCH
from engine.content.store import ContentStore
from engine.diff.apply import apply_layer
from engine.errors import DigestMismatch, EngineError, FailedPrecondition, NotFound, Refused
from engine.failpoints import armed
from engine.following import Following
from engine.fs import durable, kernel
from engine.gc import collect as collecting
from engine.kv.environment import Environment
from engine.kv.schema import EXTENT, FORMAT, INGESTS, LEASES, Blob
from engine.labels import DIFF_ID
from engine.metadata import unflushed
from engine.metadata.leases import leased
from engine.mount import deactivate_below
from engine.mounts.mounting import Order
from engine.oci.digest import Digest, digest_of
from engine.oci.platform import Platform
from engine.processes import Owner
from engine.provision.provisioner import Provisioner
from engine.registry.client import Access, Client, open_client
from engine.root import Root
from engine.snapshots import Commit, Kind, Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from engine.testing.fake_registry import respond, response
from engine.testing.taking_registry import TakingRegistry
from engine.unpack.workshop import open_workshop
from tests.command import LAMINA, environment
from tests.conftest import AMD64, peer
from tests.durability import Recorder, matches, recorded
from tests.engine.image_files import AMD64 as ON_AMD64
from tests.engine.image_files import import_image
from tests.inline import workers_inline
from tests.registry.asking import Served

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0", "all_in_extents")]

DOCS = Path(__file__).parents[2] / "docs" / "on-disk.md"
LAYER = archive(member("etc/", "5"), member("etc/passwd", data=b"root\n"))
BIG = bytes(9 * EXTENT + 5)  # three transactions: eight extents, one, and what is left


@dataclass(frozen=True)
class World:
    """A store, and what records the work that is done to it."""

    stores: Stores
    folder: Path
    record: Callable[[], AbstractContextManager[Recorder]]


@pytest.fixture
def world(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    def record() -> AbstractContextManager[Recorder]:
        return recorded(monkeypatch, stores.root.path, tmp_path)

    (tmp_path / "mnt" / "target").mkdir(parents=True)
    # One after the other, so that there is one order: a layer's own steps are the same beside others'.
    monkeypatch.setattr(Following, "following", Nobody.following)
    with workers_inline(monkeypatch, stores.root):
        yield World(stores, tmp_path, record)


def put(content: ContentStore, data: bytes, lease: str = "", ref: str = "x", **more: object) -> Blob:
    with content.ingest(ref, lease=lease, **more) as writer:  # type: ignore[arg-type]
        writer.write(data)
        return writer.commit()


def applied(backend: Snapshotter, key: str, lease: str = "", parent: str = "") -> Commit:
    backend.prepare(key, lease=lease)
    apply_layer([LAYER], backend.sink(key), diff_id=digest_of(LAYER))
    done = f"done {key}"
    diff_id = digest_of(LAYER)
    return Commit(name=done, key=key, parent=parent or None, lease=lease, diff_id=diff_id)


def based(world: World, name: str = "overlay") -> Snapshotter:
    """Return a backend with one committed snapshot, `done base`."""
    backend = world.stores.snapshotter(name)
    backend.commit(applied(backend, "base"))
    return backend


def ended(world: World) -> None:
    """Make this process's leases and ingests those of one that died."""
    dead = Owner(id="dead")
    with world.stores.root.meta.write() as txn:
        for lease in LEASES.scan(txn, "default"):
            LEASES.put(txn, msgspec.structs.replace(lease, owner=dead), "default", lease.id)
        for ingest in INGESTS.scan(txn, "default"):
            INGESTS.put(txn, msgspec.structs.replace(ingest, owner=dead), "default", ingest.ref)


# -- operations, by their row ------------------------------------------------------------------


def opened_again(world: World) -> list[str]:
    """Who made it may have died before it was flushed."""
    path = world.folder / "new"
    with Root(path):
        pass
    with recorded(pytest.MonkeyPatch(), path) as recorder, Root(path):
        pass
    return recorder.steps


def used_again(world: World) -> list[str]:
    world.stores.snapshotter("overlay")
    other = Stores(world.stores.root, "other", AMD64)
    with world.record() as recorder:
        other.snapshotter("overlay")
    return recorder.steps


def new_store(world: World) -> list[str]:
    path = world.folder / "another"
    with recorded(pytest.MonkeyPatch(), path) as recorder, Root(path):
        pass
    return recorder.steps


def first_use(world: World) -> list[str]:
    with world.record() as recorder:
        world.stores.snapshotter("copy")
    return recorder.steps


def blob(world: World) -> list[str]:
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        put(world.stores.content, BIG, lease, expected=digest_of(BIG), total=len(BIG))
    return recorder.steps


def small(world: World) -> list[str]:
    with (
        pytest.MonkeyPatch.context() as patch,
        leased(world.stores.root.meta, "default") as lease,
        world.record() as recorder,
    ):
        for module in ("ingests", "writer"):
            patch.setattr(f"engine.content.{module}.INLINE", 100)
        put(world.stores.content, b"data", lease, total=4)
    return recorder.steps


def small_removed(world: World) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.content.writer.INLINE", 100)
        digest = Digest(put(world.stores.content, b"data").digest)
    with world.record() as recorder:
        world.stores.remove_blob(digest)
    return recorder.steps


def kept(world: World) -> list[str]:
    with world.record() as recorder, world.stores.content.ingest("x", lease="") as writer:
        writer.write(BIG)
    return recorder.steps


def begun_anew(world: World) -> list[str]:
    with world.stores.content.ingest("x", lease="") as writer:
        writer.write(BIG)
        with world.record() as recorder:
            writer.truncate()
    return recorder.steps


def resumed(world: World) -> list[str]:
    content = world.stores.content
    with content.ingest("x", lease="") as writer:
        writer.write(BIG[: 2 * EXTENT])
    ended(world)
    with (
        leased(world.stores.root.meta, "default") as lease,
        world.record() as recorder,
        content.ingest("x", lease=lease) as writer,
    ):
        writer.write(BIG[writer.offset :])
        writer.commit()
    return recorder.steps


def second(world: World) -> list[str]:
    put(world.stores.content, BIG, ref="first")
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        put(world.stores.content, BIG, lease)
    return recorder.steps


def found(world: World) -> list[str]:
    digest = Digest(put(world.stores.content, BIG).digest)
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        world.stores.content.info(digest, lease=lease)
    return recorder.steps


def other_bytes(world: World) -> list[str]:
    with world.record() as recorder, pytest.raises(DigestMismatch):
        put(world.stores.content, BIG, expected=digest_of(b"other"))
    return recorder.steps


def imported(world: World) -> list[str]:
    source = layout(world.folder / "image", [LAYER])
    with world.record() as recorder:
        import_image(world.stores, source)
    return recorder.steps


def imported_unpacked(world: World) -> list[str]:
    source = layout(world.folder / "image", [LAYER])
    world.stores.snapshotter("overlay")
    with world.record() as recorder:
        import_image(world.stores, source, snapshotter="overlay")
    return recorder.steps


def import_given_up(world: World) -> list[str]:
    source = layout(world.folder / "image", [archive(member("h", "1", link="nowhere"))])
    world.stores.snapshotter("overlay")
    with world.record() as recorder, pytest.raises(Refused):
        import_image(world.stores, source, snapshotter="overlay")
    return recorder.steps


def batch(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        steps = [
            applied(backend, key, lease, below)
            for key, below in (("a", ""), ("b", "done a"), ("c", "done b"))
        ]
        recorder.note_names()
        backend.commit(*steps)
    return recorder.steps


def reused(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    backend.commit(applied(backend, "one"))
    backend.commit(applied(backend, "base"))
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        step = Commit(name="two", key="k", parent="done base", lease=lease, diff_id=digest_of(LAYER))
        assert backend.reuse("k", step.diff_id, lease=lease)
        backend.commit(step)
    return recorder.steps


def batch_lazily(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        step = applied(backend, "a", lease)
        recorder.note_names()
        lazily_done(world, step)
    return recorder.steps


def lazily_done(world: World, step: Commit) -> None:
    backend = world.stores.snapshotter("overlay")
    for sealing in backend.sealing(step, flush=False):
        named(sealing.run)()(sealing.argument)
    backend.commit(step)


def batch_after_lazy(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    lazily_done(world, applied(backend, "a"))
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        step = applied(backend, "b", lease)
        recorder.note_names()
        backend.commit(step)
    return recorder.steps


def flushed_late(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    lazily_done(world, applied(backend, "a"))
    with world.record() as recorder:
        backend.flush()
        backend.flush()
    return recorder.steps


def doubted(world: World, *, is_right: bool) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    put(world.stores.content, LAYER)
    step = replace(applied(backend, "a"), labels={DIFF_ID: digest_of(LAYER)})
    lazily_done(world, step)
    if not is_right:
        (file,) = world.stores.root.snapshots.glob("overlay/*/fs/etc/passwd")
        file.write_bytes(b"")
    with pytest.MonkeyPatch().context() as patch, world.record() as recorder:
        patch.setattr(unflushed, "boot_id", lambda: "another")
        patch.setattr(
            doubts,
            "apply_apart",
            lambda job, _passed: apply_layer([LAYER], job.target, diff_id=digest_of(LAYER)),
        )
        doubts.settle_doubts(world.stores.root, lambda: None)
    return recorder.steps


def prepared(world: World) -> list[str]:
    backend = based(world)
    with world.record() as recorder:
        backend.prepare("key", "done base")
    return recorder.steps


def taken(world: World) -> list[str]:
    blob = put(world.stores.content, b"x")
    with world.record() as recorder:
        world.stores.references.take("owner", "image", blob.digest)
    return recorder.steps


def released(world: World) -> list[str]:
    blob = put(world.stores.content, b"x")
    world.stores.references.take("owner", "image", blob.digest)
    with world.record() as recorder:
        world.stores.references.release("owner", {"image"}, delay_s=60)
    return recorder.steps


Work = Callable[[Engine, Client, str], Awaitable[object]]


async def pull(engine: Engine, client: Client, registry: str) -> None:
    await engine.pull(f"{registry}/a:1", client, platform=Platform(**ON_AMD64))


async def fail_to_pull(engine: Engine, client: Client, registry: str) -> None:
    with pytest.raises(NotFound):
        await pull(engine, client, registry)


async def push(engine: Engine, client: Client, registry: str) -> None:
    await engine.push(f"{registry}/a:1", client, f"{registry}/b:1")


def reached(world: World, *works: Work, absent: bool = False) -> list[str]:
    """Return the steps of the last of some works with a registry, which may lack a layer."""
    with TakingRegistry().running() as registry:
        served = Served(registry)
        if absent:
            registry.plan(f"GET .*{served.layers[0].digest}", respond(response(404)), times=1)

        async def run() -> list[str]:
            async with open_workshop(world.stores.root) as workshop, open_client(Access()) as client:
                engine = Engine(world.stores, workshop)
                for work in works[:-1]:
                    await work(engine, client, registry.name)
                with world.record() as recorder:
                    await works[-1](engine, client, registry.name)
                return recorder.steps

        return trio.run(run)


def prepared_copy(world: World) -> list[str]:
    backend = based(world, "copy")
    with world.record() as recorder:
        backend.prepare("key", "done base")
    return recorder.steps


def committed(world: World) -> list[str]:
    backend = based(world)
    backend.prepare("key", "done base")
    with world.record() as recorder:
        backend.commit(Commit(name="done", key="key"))
    return recorder.steps


def blob_removed(world: World) -> list[str]:
    digest = Digest(put(world.stores.content, BIG).digest)
    with world.record() as recorder:
        world.stores.remove_blob(digest)
    return recorder.steps


def snapshot_removed(world: World) -> list[str]:
    based(world).prepare("key", "done base")
    with world.record() as recorder:
        world.stores.release("key")
    return recorder.steps


def collected(world: World) -> list[str]:
    backend = based(world)
    backend.commit(applied(backend, "top", parent="done base"))
    for number in range(3):
        put(world.stores.content, b"%d" % number)
    with world.record() as recorder:
        world.stores.collect()
    return recorder.steps


def collected_after_crash(world: World) -> list[str]:
    with leased(world.stores.root.meta, "default") as lease:
        world.stores.snapshotter("overlay").prepare("key", lease=lease)
        with world.stores.content.ingest("x", lease=lease) as writer:
            writer.write(BIG)
        ended(world)
        with world.record() as recorder:
            world.stores.collect()
    return recorder.steps


async def provisioned(engine: Engine, _: Client, __: str) -> None:
    await Provisioner(engine).provision("c", "image:1", snapshotter="overlay")


async def destroyed(engine: Engine, _: Client, __: str) -> None:
    assert await Provisioner(engine).destroy("c")


def contained(world: World, *works: Work) -> list[str]:
    """Return the steps of the last of some works with an image that is unpacked."""
    source = layout(world.folder / "image", [LAYER], tag="1")

    async def unpacked(engine: Engine, _: Client, __: str) -> None:
        await engine.import_image(source, name="image:1", snapshotter="overlay")

    try:
        return reached(world, unpacked, *works)
    finally:
        deactivate_below(world.stores.root.path)


def order(world: World, *, rw: bool = False) -> Order:
    backend = based(world)
    target = world.folder / "mnt" / "target"
    return Order(target=target, backend=backend, image="x", top="done base", rw=rw)


def mounted(world: World) -> list[str]:
    wanted = order(world)
    with world.record() as recorder:
        world.stores.mounting.mount(wanted)
    world.stores.umount(wanted.target)
    return recorder.steps


def unmounted(world: World, *, rw: bool = False, lazy: bool = False) -> list[str]:
    wanted = order(world, rw=rw)
    world.stores.mounting.mount(wanted)
    with world.record() as recorder:
        world.stores.umount(wanted.target, lazy=lazy)
    return recorder.steps


def compacted(world: World) -> list[str]:
    path = world.folder / "large"
    with Root(path) as root:
        content = Stores(root, "default", AMD64).content
        put(content, BIG)
        content.delete(digest_of(BIG))
        content.cleanup()
    with recorded(pytest.MonkeyPatch(), path) as recorder:
        compact_store(path)
    return recorder.steps


def applied_again(world: World) -> list[str]:
    backend = world.stores.snapshotter("overlay")
    put(world.stores.content, LAYER)
    about = {DIFF_ID: digest_of(LAYER)}
    backend.commit(replace(applied(backend, "base"), labels=about))
    (file,) = world.stores.root.snapshots.glob("overlay/*/fs/etc/passwd")
    file.write_text("mallory")
    with world.record() as recorder:
        checked = world.stores.check(
            apply=lambda job: apply_layer([LAYER], job.target, diff_id=digest_of(LAYER))
        )
    assert not checked.left
    return recorder.steps


OPERATIONS: dict[str, Callable[[World], list[str]]] = {
    "a new store": new_store,
    "a store that is there, opened to write": opened_again,
    "a backend's first use": first_use,
    "a backend that was used before, opened to write": used_again,
    "a blob": blob,
    "a small blob, announced as one": small,
    "removing a small blob": small_removed,
    "a blob that is not finished, to go on with": kept,
    "a blob that is begun anew": begun_anew,
    "a blob, where another writer went on from a dead one's": resumed,
    "a blob that someone else was first with": second,
    "a blob that is found": found,
    "a blob with other bytes than announced": other_bytes,
    "import": imported,
    "import, unpacked": imported_unpacked,
    "import that cannot be unpacked": import_given_up,
    "layers of a batch": batch,
    "a layer that is there, on another base": reused,
    "layers of a batch, lazily": batch_lazily,
    "layers of a batch, after a lazy one": batch_after_lazy,
    "what was committed lazily, by `gc` or who opens the store later": flushed_late,
    "what was committed lazily, after a power cut": lambda world: doubted(world, is_right=True),
    "the same, damaged": lambda world: doubted(world, is_right=False),
    "prepare": prepared,
    "prepare, a copy": prepared_copy,
    "pull": lambda world: reached(world, pull),
    "pull that fails": lambda world: reached(world, fail_to_pull, absent=True),
    "the same, gone on with": lambda world: reached(world, fail_to_pull, pull, absent=True),
    "push": lambda world: reached(world, pull, push),
    "an image, held for an owner": taken,
    "an image, released": released,
    "commit of what was written through a mount": committed,
    "removing a blob": blob_removed,
    "removing a snapshot": snapshot_removed,
    "gc": collected,
    "gc, after a crash": collected_after_crash,
    "snapshot applied again": applied_again,
    "compact": compacted,
    "mount": mounted,
    "umount": unmounted,
    "umount, writable": lambda world: unmounted(world, rw=True),
    "umount --lazy": lambda world: unmounted(world, lazy=True),
    "a container, provisioned": lambda world: contained(world, provisioned),
    "a container, destroyed": lambda world: contained(world, provisioned, destroyed),
}


def written() -> dict[str, str]:
    """Return the steps of each row of the table in the docs."""
    table = DOCS.read_text(encoding="utf-8").partition("| what | steps |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| (`.+|\(.+) \|$", table, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("row", OPERATIONS)
def test_steps_are_in_the_order_that_is_promised(
    world: World, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_SLICE_S", 60)  # else a busy machine makes it several transactions
    steps = OPERATIONS[row](world)
    assert matches(steps, written()[row]), "\n".join(steps)


def test_every_row_of_the_docs_is_held() -> None:
    assert written().keys() == OPERATIONS.keys()


@pytest.mark.parametrize("name", ["overlay", "aufs", "copy"])
def test_up_21_a_layer_is_durable_before_its_record_in_every_backend(world: World, name: str) -> None:
    backend = world.stores.snapshotter(name)
    with leased(world.stores.root.meta, "default") as lease, world.record() as recorder:
        backend.commit(applied(backend, "key", lease))
    made = [step for step in recorder.steps if not step.startswith("files +folder")]
    if not backend.capabilities.shares:
        assert made.pop() == "files -outline"  # which only a layer that may be reused keeps
    promised = written()["import, unpacked"].partition("+work` ")[2].partition(" ~blob`")[0]
    assert matches(made, f"`meta +pin +snapshot` {promised}`"), "\n".join(recorder.steps)


# -- a flush that fails ------------------------------------------------------------------------


def fails(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "a disk that dies")


@pytest.mark.parametrize("file", [-1, 10_000])
def test_syncfs_says_what_the_kernel_says(file: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.syncfs(file)


def test_fsync_says_what_the_kernel_says(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        durable.flush(10_000)
    with pytest.raises(FileNotFoundError):
        durable.flush_names(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("name", ["overlay", "aufs", "copy"])
@pytest.mark.parametrize("is_applied", [True, False])
def test_what_cannot_be_flushed_is_not_committed(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, is_applied: bool
) -> None:
    backend = world.stores.snapshotter(name)
    if is_applied:
        step = applied(backend, "key")
    else:
        backend.prepare("key")
        step = Commit(name="done key", key="key")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "syncfs", fails)
        with pytest.raises(EngineError, match=r"snapshots in .*: a disk that dies"):
            backend.commit(step)
    assert [info.kind for info in backend.walk()] == [Kind.ACTIVE]
    assert not (world.stores.root.snapshots / name / "1" / "sealed").exists()


@pytest.mark.parametrize("seam", ["fsync", "syncfs"])
def test_what_cannot_be_flushed_is_not_prepared(
    world: World, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    backend = based(world, "copy")
    with monkeypatch.context() as patch:
        patch.setattr(os if seam == "fsync" else durable, seam, fails)
        with pytest.raises(EngineError, match="a disk that dies"):
            backend.prepare("key", "done base")
    world.stores.collect()
    assert "key" not in {info.key for info in backend.walk()}


def test_the_trash_record_of_a_removal_that_cannot_be_flushed_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = based(world)
    backend.remove("done base")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(EngineError, match="a disk that dies"):
            backend.cleanup()
    with world.record() as recorder:
        backend.cleanup()
    assert recorder.steps == ["flush backend, trash", "meta -trash"]


def test_a_store_that_cannot_be_flushed_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(EngineError, match="a disk that dies"):
        Root(tmp_path / "root")


def test_what_a_failed_commit_sealed_counts_and_it_says_why(world: World) -> None:
    backend = world.stores.snapshotter("overlay")
    steps = [applied(backend, "a"), applied(backend, "b", parent="done a")]
    (world.stores.root.snapshots / "overlay" / "2" / "settling").touch()
    with pytest.raises(FailedPrecondition, match="failed halfway"):
        backend.commit(*steps)
    assert {info.key for info in backend.walk()} == {"done a", "b"}


def test_all_of_a_format_is_durable_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bytes] = []

    def watched(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        flushed.extend([path.read_bytes()] if path.is_file() else [])

    monkeypatch.setattr(os, "fsync", watched)
    with Root(tmp_path / "root"):
        assert flushed[0] == b"%d\n" % FORMAT


def test_all_folders_above_a_store_that_are_new_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    with Root(tmp_path / "a" / "b" / "root"):
        assert flushed[:3] == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]


def test_a_transaction_of_bytes_stays_small(world: World) -> None:
    """LMDB holds its pages in memory until it is done, and writers wait for it."""
    with world.record() as recorder:
        put(world.stores.content, bytes(17 * EXTENT))
    assert recorder.steps.count("blobs +extent") == 3
    assert BATCH < 16 << 20


def test_the_reserve_is_kept_again_after_a_failure(world: World) -> None:
    reserve = world.stores.root.path / "reserve"
    put(world.stores.content, b"garbage")
    with armed("gc.swept", "error"), pytest.raises(EngineError, match="failpoint"):
        world.stores.collect()
    assert reserve.stat().st_size


# -- LMDB's own --------------------------------------------------------------------------------


def test_lmdb_runs_with_its_default_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a map was made anew, and where a small one had to do."""
    with Root(tmp_path / "root") as root:
        environments = [root.meta, root.blobs]
        for environment in environments:
            assert_syncs(environment)
            environment._map_anew()
            assert_syncs(environment)


def assert_syncs(environment: Environment) -> None:
    flags = environment._env.flags()
    wrong = {"sync": False, "metasync": False, "writemap": True, "map_async": True, "lock": False}
    assert {name: dict(flags)[name] for name in wrong} == {name: not bad for name, bad in wrong.items()}


# -- from outside ------------------------------------------------------------------------------

_CALLS = "openat,write,writev,pwrite64,pwritev,fdatasync,fsync,msync,syncfs,rename"
_CALL = re.compile(r"^[0-9]+ +(\w+)\((.*)\) += (?:0|[0-9]+)(?:<[^>]*>)?$", re.MULTILINE)


def seen_from_outside(trace: str, root: Path) -> str:
    """Return what became durable: M and B for commits of meta and blobs, S for syncfs, R for a seal.

    A commit is LMDB's: pages, then fdatasync, then its head through a descriptor that is O_DSYNC.
    """
    events, unsynced, through = "", set(), set()
    for call, words in _CALL.findall(trace):
        found = re.search(rf"{root}/(meta|blobs)\.lmdb/data\.mdb", words)
        file = found[1] if found else ""
        if call == "syncfs" and f"<{root}/snapshots" in words:
            events += "S"
        elif call == "rename" and words.endswith('/sealed"'):
            events += "R"
        elif not file:
            continue
        elif call == "openat":
            if "O_DSYNC" in words and "O_WRONLY" in words:
                through.add(file)
        elif call == "fdatasync":
            unsynced.discard(file)
        elif "write" in call and re.search(r", 120, (32|4128)$", words):
            assert file in through, f"the head of {file} is not written through"
            assert file not in unsynced, f"the head of {file} before its pages are synced"
            events += file[0].upper()
        elif "write" in call:
            unsynced.add(file)
        assert call != "msync", "nothing is written through a map"
    return events


def test_a_real_import_and_unpack_from_outside(tmp_path: Path) -> None:
    source, root = layout(tmp_path / "image", [LAYER], tag="x:1"), tmp_path / "root"
    # Tables, a lease; three blobs; the name, no lease.
    assert traced(root, "import", "--no-unpack", source) == "MM" + "MMM" + "MM"
    # A lease, pins; a snapshot, sealed, committed; the anchor, the use, no lease.
    assert traced(root, "unpack", "--snapshotter", "overlay", "x:1") == "MM" + "MSRM" + "MMM"


def traced(root: Path, *words: object) -> str:
    trace = root.with_name("trace")
    command = [*LAMINA, "--root", root, *words]
    strace = [peer("strace"), "-f", "-y", "-qq", "-s", "0", "-e", f"trace={_CALLS}", "-o", trace]
    subprocess.run([*strace, *command], check=True, capture_output=True, env=environment())
    return seen_from_outside(trace.read_text(encoding="utf-8"), root)
