"""After the machine went down, what was committed without being flushed is checked before it is used."""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
import trio

from engine import doubts, failpoints
from engine.app import Engine, open_engine
from engine.diff.apply import Applied
from engine.errors import DataLoss, NotFound, ResourceExhausted
from engine.images.facts import ImageFacts
from engine.images.states import State, Use, state_of
from engine.kv.schema import SMALL, SNAPSHOTS, UNFLUSHED, now
from engine.metadata import ledger, unflushed
from engine.metadata.nodes import blob_node
from engine.root import Root
from engine.snapshots import Commit, Durability
from engine.stores import Stores, host_platform, open_stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import TreeEntry
from engine.unpack.apart import apply_apart
from engine.unpack.flusher import Flusher
from engine.unpack.jobs import ApplyJob
from tests.command import dump, lamina
from tests.filesystems import formatted, in_memory
from tests.processes import Victim
from tests.support import tree_of

pytestmark = [pytest.mark.crash, pytest.mark.root]

BASE = archive(member("etc/", "5", mode=0o750), member("etc/passwd", data=b"root\n" * 100))
TOP = archive(member("etc/hosts", data=b"::1\n"), member("usr/x", data=os.urandom(100_000)))
NAME = "a:1"


def opened(root: Path, *, readonly: bool = False) -> AbstractContextManager[Stores]:
    return open_stores(root, "default", host_platform(), readonly=readonly)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout(tmp_path_factory.mktemp("image"), [BASE, TOP])


@pytest.fixture(scope="module")
def lazily(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an image that was unpacked and not flushed."""
    root = tmp_path_factory.mktemp("lazily") / "root"
    lamina(root, "import", "--durability=lazy", "--snapshotter=overlay", "--name", NAME, image)
    return root


@pytest.fixture
def up(lazily: Path, tmp_path: Path) -> Path:
    """A copy, in the same boot."""
    copied = tmp_path / "root"
    subprocess.run(["cp", "-a", lazily, copied], check=True)
    changed(copied, at=now())  # however long the tests take
    return copied


@pytest.fixture
def root(up: Path) -> Path:
    """A copy, after the machine went down."""
    changed(up, boot="another")
    return up


def notes(root: Path) -> int:
    return len(dump(root)["unflushed"])


def changed(root: Path, **fields: object) -> None:
    """Change the notes: when they were made, and in which boot."""
    with Root(root) as store, store.meta.write() as txn:
        for names, found in list(UNFLUSHED.entries(txn)):
            UNFLUSHED.put(txn, msgspec.structs.replace(found, **fields), names[0], found.id)


def chain(stores: Stores) -> list[str]:
    return list(stores.resolve(stores.images.get(NAME).target).chain)


def tree(root: Path) -> dict[bytes, TreeEntry]:
    with opened(root) as stores:
        return tree_of(stores, "overlay", chain(stores)[-1], root.with_name("mnt"))


@pytest.fixture(scope="module")
def right(image: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, TreeEntry]:
    root = tmp_path_factory.mktemp("right") / "root"
    lamina(root, "import", "--snapshotter=overlay", "--name", NAME, image)
    assert notes(root) == 0
    return tree(root)


def files(root: Path, name: str) -> list[Path]:
    found = list(root.glob(f"snapshots/overlay/*/fs/{name}"))
    assert found
    return found


def emptied(root: Path) -> None:
    for file in files(root, "*/*"):
        os.truncate(file, 0)


def zeroed(root: Path) -> None:
    (file,) = files(root, "usr/x")
    times = file.stat()
    file.write_bytes(bytes(times.st_size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def lost(root: Path) -> None:
    (file,) = files(root, "etc/passwd")
    file.unlink()


def lost_folder(root: Path) -> None:
    for folder in root.glob("snapshots/overlay/*"):
        shutil.rmtree(folder)


def without_blobs(root: Path) -> None:
    with opened(root, readonly=True) as stores:
        layers = stores.resolve(stores.images.get(NAME).target).manifest.layers
        found = [stores.content.info(layer.key) for layer in layers]
    with Root(root) as store, store.meta.write() as txn:
        for blob in found:
            ledger.drop(txn, "default", blob_node(blob.digest))


# -- what is noted, and when it goes ------------------------------------------------------------


def test_what_was_not_flushed_is_noted_and_served_in_this_boot(up: Path) -> None:
    assert notes(up) == 2
    assert tree(up)
    assert notes(up) == 2, "it takes a flush, or a power cut"


def test_an_unpack_that_is_durable_flushes_what_it_finds(up: Path) -> None:
    lamina(up, "unpack", "--snapshotter=overlay", "--durability=lazy", NAME)
    assert notes(up) == 2
    lamina(up, "unpack", "--snapshotter=overlay", NAME)
    assert notes(up) == 0


def test_nothing_is_flushed_beside_the_work(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flusher, "beside", lambda *_: pytest.fail("it flushes"))
    words = ["--durability=lazy", "--snapshotter=overlay", image]
    lamina(tmp_path / "root", "import", *words)


def test_who_joins_work_that_is_not_durable_flushes_it(image: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", "--name", NAME, image)

    async def unpack(engine: Engine) -> None:
        await engine.unpack(NAME, snapshotter="overlay")

    async def main() -> None:
        async with (
            open_engine(root, durability=Durability.LAZY) as lazy,
            open_engine(root) as full,
            trio.open_nursery() as nursery,
        ):
            for engine in (lazy, full):
                nursery.start_soon(unpack, engine)

    trio.run(main)
    assert notes(root) == 0


def test_a_note_that_cannot_be_read_is_mended(up: Path) -> None:
    with (
        Root(up) as store,
        store.meta.write() as txn,
        txn.raw.cursor(db=txn.databases[UNFLUSHED.name]) as cursor,
    ):
        assert cursor.first()
        cursor.put(cursor.key(), b"?")
    with opened(up, readonly=True) as stores, pytest.raises(DataLoss):
        # Of them all: the first to be committed need not be the first to be begun.
        [*map(stores.snapshotter("overlay").stat, chain(stores))]
    lamina(up, "fsck", code=5)
    lamina(up, "fsck", "--repair")
    lamina(up, "fsck")
    assert notes(up) == 1


def test_a_commit_that_is_durable_flushes_what_was_there(up: Path) -> None:
    with opened(up) as stores:
        backend = stores.snapshotter("overlay")
        backend.prepare("x")
        backend.commit(Commit(name="y", key="x"))
    assert notes(up) == 0


def test_a_collection_flushes(up: Path) -> None:
    lamina(up, "gc")
    assert notes(up) == 0


def test_who_opens_it_a_minute_later_flushes(up: Path) -> None:
    changed(up, at=now() - 59 * 10**9)
    with opened(up):
        pass
    assert notes(up) == 2
    changed(up, at=now() - 61 * 10**9)
    with opened(up):
        pass
    assert notes(up) == 0


def test_no_flush_takes_away_what_another_boot_left(root: Path) -> None:
    with Root(root) as store:
        store_notes = unflushed.doubted(store.meta)
        with store.meta.write() as txn:
            unflushed.clear(txn, "overlay", unflushed.last(txn, "overlay"))
        assert unflushed.doubted(store.meta) == store_notes


def test_what_is_noted_while_a_flush_is_under_way_stays(up: Path) -> None:
    with Root(up) as store:
        with store.meta.read() as txn:
            (first, second) = sorted(UNFLUSHED.scan(txn, "overlay"), key=lambda one: one.number)
        with store.meta.write() as txn:
            unflushed.clear(txn, "overlay", first.number)
        with store.meta.read() as txn:
            assert UNFLUSHED.scan(txn, "overlay") == [second]


# -- after the machine went down ----------------------------------------------------------------


def test_what_is_right_is_served_after_a_look(
    root: Path, right: dict[bytes, TreeEntry], caplog: pytest.LogCaptureFixture
) -> None:
    assert tree(root) == right
    assert notes(root) == 0
    assert "checking 2 snapshots that the machine went down before flushing" in caplog.text
    assert "applied again" not in caplog.text


@pytest.mark.parametrize("damage", [emptied, zeroed, lost, lost_folder])
def test_what_is_damaged_is_applied_again(
    root: Path,
    right: dict[bytes, TreeEntry],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: list[ApplyJob] = []

    def apply(job: ApplyJob, passed: Callable[[], None]) -> Applied:
        applied.append(job)
        return apply_apart(job, passed)

    monkeypatch.setattr(doubts, "apply_apart", apply)
    damage(root)
    assert tree(root) == right
    assert (
        len(applied)
        == caplog.text.count("applied again from its layer")
        == 1 + (damage in {emptied, lost_folder})
    )
    assert notes(root) == 0
    lamina(root, "fsck")


@pytest.mark.parametrize("name", ["aufs", "copy"])
def test_every_backend_is_held_against_its_layers(
    image: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    lamina(root, "import", "--durability=lazy", f"--snapshotter={name}", "--name", NAME, image)
    changed(root, boot="another")
    for file in root.glob(f"snapshots/{name}/*/fs/*/*"):
        os.truncate(file, 1)
    with opened(root) as stores:
        assert stores.snapshotter(name).stat(chain(stores)[-1])
    assert caplog.text.count("applied again from its layer") == 2
    lamina(root, "fsck")


def test_all_that_share_a_folder_are_checked(
    up: Path, tmp_path: Path, right: dict[bytes, TreeEntry]
) -> None:
    base = archive(member("etc/", "5", mode=0o750), member("etc/group", data=b"root\n"))
    other = layout(tmp_path / "other", [base, TOP])
    lamina(up, "import", "--durability=lazy", "--snapshotter=overlay", "--name", "b:1", other)
    ids = [record["id"] for record in dump(up)["snapshots"]]
    assert (len(ids), len(set(ids))) == (4, 3)
    changed(up, boot="another")
    zeroed(up)
    assert tree(up) == right
    assert notes(up) == 0
    lamina(up, "fsck")


def test_what_cannot_be_mended_goes_with_what_stands_on_it(
    root: Path, image: Path, right: dict[bytes, TreeEntry], caplog: pytest.LogCaptureFixture
) -> None:
    lost(root)
    without_blobs(root)
    with opened(root) as stores, pytest.raises(NotFound):
        stores.snapshotter("overlay").stat(chain(stores)[0])
    assert "removed; unpack its image again" in caplog.text
    assert (notes(root), dump(root)["snapshots"]) == (0, [])
    lamina(root, "import", "--snapshotter=overlay", "--replace", "--name", NAME, image)
    assert tree(root) == right


def test_what_nobody_can_check_is_not_trusted(root: Path) -> None:
    """As many files as there were, whatever is in them: without the layer nobody can tell."""
    without_blobs(root)
    with opened(root):
        pass
    assert (notes(root), dump(root)["snapshots"]) == (0, [])


def test_what_is_in_use_stays_and_is_not_served(
    root: Path, tmp_path: Path, right: dict[bytes, TreeEntry], caplog: pytest.LogCaptureFixture
) -> None:
    changed(root, boot=unflushed.boot_id())
    with opened(root) as stores:
        bottom, top = chain(stores)
        stores.snapshotter("overlay").prepare("container", top)
    changed(root, boot="another")
    lost(root)
    without_blobs(root)
    with opened(root) as stores:
        backend = stores.snapshotter("overlay")
        for refused in (
            lambda: backend.stat(bottom),
            lambda: backend.prepare("other", top),
            lambda: backend.view("other", top),
            lambda: backend.mounts("container"),
        ):
            with pytest.raises(DataLoss, match="was not flushed when the machine went down"):
                refused()
    assert "stays, and is not used: snapshot container stands on it" in caplog.text
    assert notes(root) == 2
    plain = layout(tmp_path / "plain", [BASE, TOP], compression="none")
    lamina(root, "import", "--no-unpack", "--name", "plain:1", plain)
    assert tree(root) == right
    assert notes(root) == 0


def test_what_cannot_be_mended_now_waits_for_the_next(
    root: Path, right: dict[bytes, TreeEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_job: ApplyJob, _passed: Callable[[], None]) -> Applied:
        raise ResourceExhausted("the disk is full")

    lost(root)
    with monkeypatch.context() as patch:
        patch.setattr(doubts, "apply_apart", full)
        with opened(root) as stores, pytest.raises(DataLoss):
            stores.snapshotter("overlay").stat(chain(stores)[0])
    assert tree(root) == right


def test_a_blob_that_is_damaged_too_is_no_way_back(root: Path) -> None:
    lost(root)
    with opened(root, readonly=True) as stores:
        layers = stores.resolve(stores.images.get(NAME).target).manifest.layers
        found = stores.content.info(layers[0].key)
    with Root(root) as store, store.meta.write() as txn:
        small = SMALL.get(txn, found.number)
        assert small is not None
        SMALL.put(txn, msgspec.structs.replace(small, data=bytes(found.size)), found.number)
    with opened(root):
        pass
    assert (notes(root), dump(root)["snapshots"]) == (0, [])


def test_work_of_who_died_does_not_keep_it(root: Path) -> None:
    with Root(root) as store, store.meta.write() as txn:
        (parent,) = (one for one in SNAPSHOTS.scan(txn, "overlay", "default") if not one.parent)
        half = msgspec.structs.replace(
            parent, key="extract", id=999, kind="active", parent=parent.key, lease="dead"
        )
        ledger.put_snapshot(txn, "overlay", "default", half)
    without_blobs(root)
    with opened(root):
        pass
    assert (notes(root), dump(root)["snapshots"]) == (0, [])


def test_a_reader_neither_checks_nor_is_served(root: Path) -> None:
    before = notes(root)
    with opened(root, readonly=True) as stores:
        backend = stores.snapshotter("overlay")
        with pytest.raises(DataLoss):
            backend.stat(chain(stores)[0])
        assert len(list(backend.walk())) == 2, "listings show it"
    lamina(root, "snapshots", "ls")
    lamina(root, "du")
    assert "a:1" in lamina(root, "images").stdout
    assert notes(root) == before


def test_what_is_in_doubt_is_not_said_to_be_unpacked(root: Path) -> None:
    with opened(root, readonly=True) as stores:
        told = state_of(stores, NAME)
        assert (told.state, told.parts.unpacked) == (State.FETCHED, {})
        assert Use.RUN not in told.parts.uses
        (known,) = ImageFacts(stores).walk()
        assert not known.is_ready


def test_a_process_that_dies_leaves_nothing_in_doubt(image: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    words = ["import", "--durability=lazy", "--snapshotter=overlay", "--name", NAME, str(image)]
    code, messages = Victim(root, words, "unpack.anchored=kill").wait()
    assert code == -signal.SIGKILL, messages
    with opened(root):
        pass
    assert notes(root) == 2, "the kernel has what it wrote"


def test_who_opens_it_meanwhile_waits(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []
    lock = os.open(root / "recovery", os.O_RDONLY | os.O_CREAT, 0o600)
    waits = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for" in record.getMessage():
                waits.set()

    def work() -> None:
        with opened(root):
            order.append("open")

    heard = Heard()
    logging.getLogger("engine.doubts").addHandler(heard)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=work)
        thread.start()
        assert waits.wait(30)
        order.append("let go")
        os.close(lock)
        thread.join(30)
    finally:
        logging.getLogger("engine.doubts").removeHandler(heard)
    assert order == ["let go", "open"]
    assert notes(root) == 0


def test_an_engine_checks_as_it_opens(root: Path, right: dict[bytes, TreeEntry]) -> None:
    """The thread that asks whether it is still wanted has to be one of the event loop's."""
    emptied(root)

    async def main() -> None:
        async with open_engine(root):
            pass

    trio.run(main)
    assert (notes(root), tree(root)) == (0, right)


def test_who_waits_can_be_cancelled(root: Path) -> None:
    lock = os.open(root / "recovery", os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)

    async def work() -> None:
        async with open_engine(root):
            pytest.fail("it was let in")

    async def main() -> bool:
        with trio.move_on_after(0.05) as scope:
            await work()
        return scope.cancelled_caught

    try:
        assert trio.run(main)
    finally:
        os.close(lock)


def test_nothing_to_check_is_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unflushed, "boot_id", lambda: pytest.fail("there is no note"))
    monkeypatch.setattr(doubts, "_alone", lambda *_: pytest.fail("nothing is to be done"))
    with opened(tmp_path / "root"):
        pass


# -- and whoever dies at it ---------------------------------------------------------------------

POINTS = ("doubts.checked", "doubts.mended", "doubts.dropped")


@pytest.mark.parametrize("point", [*POINTS, "snapshot.replace.recorded", "fsck.snapshot.applied"])
def test_the_next_completes_what_one_began(
    root: Path, right: dict[bytes, TreeEntry], point: str
) -> None:
    lost(root)
    code, messages = Victim(root, ["gc"], f"{point}=kill").wait()
    assert code == -signal.SIGKILL, messages or "the point was not reached"
    assert tree(root) == right
    assert notes(root) == 0
    lamina(root, "gc")
    lamina(root, "fsck")


def test_every_point_is_met() -> None:
    assert {name for name in failpoints.NAMES if name.startswith("doubts.")} == set(POINTS)


def test_who_dies_after_a_flush_leaves_it_noted(up: Path) -> None:
    code, messages = Victim(up, ["gc"], "snapshot.flush.done=kill").wait()
    assert code == -signal.SIGKILL, messages
    assert notes(up) == 2
    lamina(up, "gc")
    assert notes(up) == 0


# -- a real one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", Durability)
def test_what_a_power_cut_leaves_of_a_file_system(
    image: Path,
    tmp_path: Path,
    right: dict[bytes, TreeEntry],
    monkeypatch: pytest.MonkeyPatch,
    durability: Durability,
) -> None:
    """The file below a mounted ext4 is what a disk has when the power goes."""
    with in_memory(tmp_path / "memory") as memory:
        disk, cut, target = memory / "disk", memory / "cut", memory / "target"
        target.mkdir()
        with formatted("ext4", disk, target) as mounted:
            words = ["--durability", str(durability), "--snapshotter=overlay", "--name", NAME]
            lamina(mounted / "root", "import", *words, image)
            subprocess.run(["cp", "--sparse=always", disk, cut], check=True)
        monkeypatch.setattr(unflushed, "boot_id", lambda: "another")
        subprocess.run(["mount", "-o", "loop", cut, target], check=True)
        try:
            with Root(target / "root") as store:
                doubted = unflushed.doubted(store.meta)
            assert len(doubted) == (2 if durability is Durability.LAZY else 0)
            assert tree(target / "root") == right
            lamina(target / "root", "fsck")
        finally:
            subprocess.run(["umount", target], check=True)
