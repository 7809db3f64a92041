"""What work made or found stays until it is anchored, whatever is collected or removed meanwhile."""

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine
from engine.archive.importer import Wanted, import_images
from engine.archive.intake import Nobody
from engine.errors import AlreadyExists, EngineError, NotFound
from engine.gc import holding, survey
from engine.images.states import parts_of
from engine.kv import turn
from engine.kv.schema import LEASES
from engine.metadata import ledger
from engine.metadata.leases import leased
from engine.metadata.nodes import blob_node, snapshot_node
from engine.mount import mounted
from engine.mounts.mounting import Order
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.progress import Report, Step, silent
from engine.root import Root
from engine.snapshots import Commit, Kind
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from engine.unpack.layer_flight import LayerFlight
from engine.unpack.workshop import open_workshop
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST, docker_files, tar_of
from tests.filesystems import in_memory
from tests.inline import workers_inline
from tests.meddling import meddled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0", "all_in_extents")]

LAYERS = [archive(member("a/x")), archive(member("b")), archive(member("a/.wh.x"))]
Work = Callable[[Engine], Awaitable[None]]
NAME = "docker.io/library/image:latest"


@dataclass(frozen=True)
class World:
    """Stores in memory whose workers are threads, a source of an image, and a folder to mount at."""

    stores: Stores
    source: Path
    docker: Path
    target: Path
    patch: pytest.MonkeyPatch
    gates: list[Callable[[], Awaitable[None]]]

    def run(self, *work: Work) -> None:
        """Do several things with one engine at one time."""

        async def main() -> None:
            with trio.fail_after(60):
                async with open_workshop(self.stores.root) as workshop, trio.open_nursery() as nursery:
                    for one in work:
                        nursery.start_soon(one, Engine(self.stores, workshop))

        trio.run(main)

    def collect(self) -> None:
        self.stores.collect()

    def tops(self, name: str = NAME) -> dict[str, str]:
        """Check that an image is whole, and return where it is unpacked."""
        image = self.stores.resolve(self.stores.images.get(name).target)
        for part in (*image.path, image.manifest.config, *image.manifest.layers):
            self.stores.content.verify(part.key)
        tops = parts_of(self.stores, image).unpacked
        for backend, top in tops.items():
            chain = []
            while top:
                info = self.stores.snapshotter(backend).stat(top)
                assert info.kind is Kind.COMMITTED
                chain.append(info.key)
                top = info.parent
            assert chain[::-1] == image.chain
            for record in chain:
                (mount,) = self.stores.snapshotter(backend).view("look", record)
                assert Path(mount.source).is_dir() or mount.type in {"overlay", "aufs"}
                self.stores.release("look", backend)
        return tops


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    source = layout(tmp_path / "image", LAYERS, compression="none")
    docker = tar_of(tmp_path / "image.tar", docker_files(LAYERS, entry={"RepoTags": [NAME]}))
    (tmp_path / "target").mkdir()
    with in_memory(tmp_path / "memory") as memory, Root(memory / "root") as root:
        assert root.owners.me.id
        stores = Stores(root, "default", AMD64)
        for backend in ("overlay", "copy", "aufs"):
            stores.snapshotter(backend)
        with workers_inline(monkeypatch, root) as gates:
            yield World(stores, source, docker, tmp_path / "target", monkeypatch, gates)


def importing(source: Path, name: str | None = None, backend: str | None = None) -> Work:
    async def work(engine: Engine) -> None:
        await engine.import_image(source, name=name, snapshotter=backend)

    return work


def unpacking(backend: str, name: str = NAME) -> Work:
    async def work(engine: Engine) -> None:
        await engine.unpack(name, snapshotter=backend)

    return work


def preparing(backend: str) -> Work:
    async def work(engine: Engine) -> None:
        await engine.prepare("rootfs", NAME, snapshotter=backend)

    return work


# -- a collection before every transaction -----------------------------------------------------


@pytest.mark.parametrize("backend", [None, "overlay", "copy", "aufs"])
@pytest.mark.parametrize("form", ["source", "docker"])
def test_collections_all_through_an_import(world: World, form: str, backend: str | None) -> None:
    with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()) as passed:
        world.run(importing(getattr(world, form), backend=backend))
    assert len(passed) > 10
    assert list(world.tops()) == [backend] * (backend is not None)
    assert not world.stores.collect().blobs


@pytest.mark.parametrize("missing", ["layer", "config", "manifest"])
def test_what_a_source_leaves_out_stays_from_the_first_look(world: World, missing: str) -> None:
    """That the store has it decides that the import goes on; from then on nobody may take it away."""
    world.run(importing(world.source, "held:1"))
    image = world.stores.resolve(world.stores.images.get("held:1").target)
    parts = {
        "layer": image.manifest.layers[0],
        "config": image.manifest.config,
        "manifest": image.path[-1],
    }
    (world.source / "blobs" / parts[missing].digest.replace(":", "/")).unlink()
    meta = world.stores.root.meta
    with (
        leased(meta, "default") as lease,
        meddled(world.patch, meta, lambda _n: world.collect()) as passed,
    ):
        brought = import_images(
            world.source,
            world.stores.content,
            Wanted(platform=AMD64),
            spool=world.stores.root.trash,
            lease=lease,
            report=silent,
            check=lambda _planned: world.stores.images.remove("held:1"),
            follower=Nobody(),
        )
        (one,) = brought.images
        world.stores.images.put_all({NAME: one.target}, replace=False)
    assert len(passed) > 10
    world.collect()
    world.tops()


@pytest.mark.parametrize("backend", ["overlay", "copy", "aufs"])
@pytest.mark.parametrize("work", [unpacking, preparing])
def test_collections_all_through_an_unpack(
    world: World, work: Callable[[str], Work], backend: str
) -> None:
    world.run(importing(world.source))
    with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()) as passed:
        world.run(work(backend))
    assert len(passed) > 10
    assert list(world.tops()) == [backend]
    assert not world.stores.collect().snapshots


def test_collections_all_through_a_mount(world: World) -> None:
    world.run(importing(world.source, backend="overlay"))
    backend = world.stores.snapshotter("overlay")
    top = world.tops()["overlay"]
    for rw in (False, True):
        order = Order(target=world.target, backend=backend, image=NAME, top=top, rw=rw)
        with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()):
            world.stores.mounting.mount(order)
            assert (world.target / "b").exists()
            world.stores.umount(world.target)
        world.tops()
    assert [r.state for r in world.stores.mounting.walk()] == ["kept"]


def test_collections_all_through_two_imports_at_once(world: World, tmp_path: Path) -> None:
    other = layout(tmp_path / "other", [*LAYERS[:2], archive(member("c"))], tag="x/other:1")
    with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()):
        world.run(importing(world.source, backend="overlay"), importing(other, backend="overlay"))
    assert world.tops().keys() == world.tops("x/other:1").keys() == {"overlay"}


# -- what was found, when who held it lets go --------------------------------------------------


def letting_go(world: World, at: int, work: Work, name: str) -> int:
    """Do work; before its transaction `at` an image loses its name and all garbage goes."""

    def meddle(number: int) -> None:
        if number == at:
            world.stores.images.remove(name)
            world.collect()

    with meddled(world.patch, world.stores.root.meta, meddle) as passed:
        world.run(work)
    return len(passed)


@pytest.mark.parametrize("backend", [None, "overlay"])
def test_an_import_that_finds_all_whenever_its_holder_goes(world: World, backend: str | None) -> None:
    at = 0
    while True:
        world.run(importing(world.source, "held:1", backend))
        passed = letting_go(world, at, importing(world.source, NAME, backend), "held:1")
        if at >= passed:
            break
        assert list(world.tops()) == [backend] * (backend is not None), at
        world.stores.images.remove(NAME)
        world.collect()
        at += 1
    assert at > 8


def test_an_unpack_on_layers_of_an_image_that_goes(world: World, tmp_path: Path) -> None:
    """Whose layers and blobs it found, and one of which it has to make."""
    more = layout(tmp_path / "more", [*LAYERS, archive(member("c"))], tag="x/more:1", compression="none")
    at = 0
    while True:
        world.run(importing(world.source, backend="overlay"))
        world.run(importing(more))
        passed = letting_go(world, at, unpacking("overlay", "x/more:1"), NAME)
        if at >= passed:
            break
        assert list(world.tops("x/more:1")) == ["overlay"], at
        world.stores.images.remove("x/more:1")
        world.collect()
        assert not list(world.stores.snapshotter("overlay").walk())
        at += 1
    assert at > 8


@pytest.mark.parametrize(("backend", "found"), [("overlay", 0), ("copy", 2)])
def test_an_image_that_is_removed_while_it_is_unpacked(
    world: World, tmp_path: Path, backend: str, found: int
) -> None:
    """Once it has all that it needs, it does not need the name; `found` layers are there before."""
    below = layout(tmp_path / "below", LAYERS[:found], tag="x/below:1", compression="none")
    at, begun = 0, 0
    while True:
        world.run(importing(below, backend=backend), importing(world.source))
        outcome = "done"
        try:
            passed = letting_go(world, at, unpacking(backend), NAME)
        except* NotFound:
            outcome = "not found"
        left = {info.kind for info in world.stores.snapshotter(backend).walk()}
        assert left <= {Kind.COMMITTED}
        if outcome == "done" and at >= passed:
            break
        assert outcome == "done" or not begun, "it failed after it had begun"
        begun = begun or (at if outcome == "done" else 0)
        for name in (NAME, "x/below:1"):
            with suppress(NotFound):
                world.stores.images.remove(name)
        world.collect()
        assert not list(world.stores.snapshotter(backend).walk())
        at += 1
    # The lease, the name, three documents, what is there, its blobs: from then on.
    assert 5 < begun < 16
    assert begun < at


# -- layers that two callers share -------------------------------------------------------------


def shared(world: World) -> trio.Event:
    """Let no layer be applied before two callers wait for one; return what says that one does."""
    begun, both = trio.Event(), trio.Event()
    join = LayerFlight.join

    def joining(self: LayerFlight, report: Report) -> None:
        join(self, report)
        if len(self._reports) > 1:
            both.set()

    async def gate() -> None:
        begun.set()
        await both.wait()
        world.gates.clear()

    world.patch.setattr(LayerFlight, "join", joining)
    world.gates.append(gate)
    return begun


@pytest.mark.parametrize("leaves", ["first", "second"])
@pytest.mark.parametrize("step", [Step.UNPACK, Step.FLUSH])
def test_one_of_two_callers_leaves_and_collections_go_on(
    world: World, tmp_path: Path, leaves: str, step: Step
) -> None:
    """The other one's layers stay, though they were begun under the lease of the one that left."""
    more = layout(tmp_path / "more", [*LAYERS, archive(member("c"))], tag="x/more:1", compression="none")
    world.run(importing(world.source), importing(more))
    scope, begun = trio.CancelScope(), shared(world)

    async def first(engine: Engine) -> None:
        with scope if leaves == "first" else nullcontext():
            await engine.unpack(NAME, snapshotter="overlay")

    async def second(engine: Engine) -> None:
        await begun.wait()  # so that the lease of the layers is the first one's

        def told(at: Step, *_: object) -> None:
            if at is step:  # of a layer that both need: the others come after it
                scope.cancel()

        with scope if leaves == "second" else nullcontext():
            await engine.unpack("x/more:1", snapshotter="overlay", report=told)

    with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()):
        world.run(first, second)
    assert scope.cancelled_caught
    assert list(world.tops(NAME if leaves == "second" else "x/more:1")) == ["overlay"]
    keys = {info.key for info in world.stores.snapshotter("overlay").walk()}
    assert not [key for key in keys if key.startswith("extract-")]
    with world.stores.root.meta.read() as txn:
        assert not LEASES.scan(txn, "default")


def test_who_stays_pins_layers_begun_under_the_lease_of_who_left(world: World) -> None:
    """That lease ends when the one who stays has all, and before he has anchored it."""
    world.run(importing(world.source))
    scope, begun = trio.CancelScope(), shared(world)

    async def first(engine: Engine) -> None:
        with scope:
            await engine.unpack(NAME, snapshotter="overlay")

    async def second(engine: Engine) -> None:
        await begun.wait()

        def told(at: Step, *_: object) -> None:
            if at is Step.FLUSH:
                scope.cancel()

        await engine.unpack(NAME, snapshotter="overlay", report=told)

    with meddled(world.patch, world.stores.root.meta, lambda _n: world.collect()):
        world.run(first, second)
    assert scope.cancelled_caught
    assert list(world.tops()) == ["overlay"]


def test_two_callers_have_their_layers_whoever_began_them(world: World) -> None:
    world.run(importing(world.source))
    begun = shared(world)

    async def first(engine: Engine) -> None:
        await engine.unpack(NAME, snapshotter="overlay")

    async def second(engine: Engine) -> None:
        await begun.wait()
        await engine.unpack(NAME, snapshotter="overlay")

    leases: list[int] = []

    def look(_number: int) -> None:
        with world.stores.root.meta.read() as txn:
            leases.append(len(LEASES.scan(txn, "default")))
        world.collect()

    with meddled(world.patch, world.stores.root.meta, look):
        world.run(first, second)
    assert max(leases) == 2
    assert list(world.tops()) == ["overlay"]


# -- mark and drop -----------------------------------------------------------------------------


def garbage(stores: Stores) -> Digest:
    """Leave a blob and a committed snapshot that nothing holds; return the blob."""
    with stores.content.ingest("x", lease="") as writer:
        writer.write(b"found again")
        digest = Digest(writer.commit().digest)
    stores.snapshotter("overlay").prepare("key")
    stores.snapshotter("overlay").commit(Commit(name="found", key="key"))
    return digest


def by_lease(stores: Stores, digest: Digest, lease: str) -> None:
    stores.content.info(digest, lease=lease)


def by_pinning(stores: Stores, digest: Digest, lease: str) -> None:
    stores.content.pin([digest], lease)


def by_ingest(stores: Stores, digest: Digest, lease: str) -> None:
    with suppress(AlreadyExists):
        stores.content.ingest("y", lease=lease, expected=digest).abort()
        raise NotFound("it was there no more")


def by_name(stores: Stores, digest: Digest, _lease: str) -> None:
    target = Descriptor(media_type=MANIFEST, digest=digest, size=11)
    stores.images.put_all({"x/y:1": target})


def by_root_label(stores: Stores, digest: Digest, _lease: str) -> None:
    stores.content.update(digest, {"containerd.io/gc.root": "x"})


def by_snapshot_lease(stores: Stores, _digest: Digest, lease: str) -> None:
    stores.snapshotter("overlay").stat("found", lease=lease)


def by_view(stores: Stores, _digest: Digest, _lease: str) -> None:
    stores.snapshotter("overlay").view("view", "found")


def by_prepare(stores: Stores, _digest: Digest, _lease: str) -> None:
    stores.snapshotter("overlay").prepare("work", "found")


def by_child(stores: Stores, _digest: Digest, lease: str) -> None:
    stores.snapshotter("overlay").prepare("work", "found", lease=lease)


OF_BLOBS = (by_lease, by_pinning, by_ingest, by_name, by_root_label)
OF_SNAPSHOTS = (by_snapshot_lease, by_view, by_prepare, by_child)


def collecting_all(stores: Stores, _digest: Digest) -> None:
    stores.collect()


def giving_up(stores: Stores, digest: Digest) -> None:
    with leased(stores.root.meta, "default") as lease:
        with stores.root.meta.write() as txn:
            for node in (blob_node(digest), snapshot_node("overlay", "found")):
                ledger.pin(txn, "default", lease, node, made=True)
        stores.give_up(lease, seconds=1)


def removing(stores: Stores, digest: Digest) -> None:
    stores.remove_blob(digest)


@pytest.mark.parametrize("hold", [*OF_BLOBS, *OF_SNAPSHOTS])
@pytest.mark.parametrize("drop", [collecting_all, giving_up, removing])
def test_nothing_is_found_between_mark_and_drop(
    world: World, monkeypatch: pytest.MonkeyPatch, drop: Callable[..., None], hold: Callable[..., None]
) -> None:
    """Who comes when all is marked and nothing dropped does not get it, or it stays."""
    stores = world.stores
    digest = garbage(stores)
    monkeypatch.setattr(turn, "WAIT_S", 0.02)
    came: list[EngineError | None] = []

    def come() -> None:
        try:
            hold(stores, digest, lease)
        except EngineError as error:
            came.append(error)
        else:
            came.append(None)

    def meeting(real: Callable[..., Any]) -> Callable[..., Any]:
        def meet(*words: Any) -> Any:
            marked = real(*words)
            if not came:
                thread = threading.Thread(target=come)
                thread.start()
                thread.join()
            return marked

        return meet

    with leased(stores.root.meta, "default") as lease:
        with monkeypatch.context() as patch:
            for place, name in (
                (survey, "reachable"),
                (holding, "only_held_by"),
                (holding, "holder"),
            ):
                patch.setattr(place, name, meeting(getattr(place, name)))
            with suppress(EngineError):
                drop(stores, digest)
        assert len(came) == 1
        if came == [None]:
            stores.collect()
            if hold in OF_BLOBS:
                assert stores.content.verify(digest)
            else:
                assert stores.snapshotter("overlay").stat("found").key
        elif drop is not removing:
            assert not list(stores.content.walk())
            assert not list(stores.snapshotter("overlay").walk())


@pytest.mark.parametrize("hold", [by_lease, by_name, by_snapshot_lease, by_prepare])
@pytest.mark.parametrize("drop", [collecting_all, giving_up, removing])
def test_what_is_found_between_two_transactions_of_a_removal(
    world: World, drop: Callable[..., None], hold: Callable[..., None]
) -> None:
    """Before each of them in turn: it is held from then on, or it was gone."""
    stores = world.stores
    at, passed = 0, [0]
    while at <= len(passed):
        for name in ("view", "work", "found"):
            stores.remove_snapshots([(stores.snapshotter("overlay"), name)])
        with suppress(NotFound):
            stores.images.remove("x/y:1")
        for blob in stores.content.walk():
            stores.content.delete(Digest(blob.digest))
        digest = garbage(stores)
        came: list[EngineError | None] = []
        with leased(stores.root.meta, "default") as lease:

            def meddle(number: int) -> None:
                if number == at:  # noqa: B023
                    try:
                        hold(stores, digest, lease)  # noqa: B023
                    except EngineError as error:
                        came.append(error)  # noqa: B023
                    else:
                        came.append(None)  # noqa: B023

            with meddled(world.patch, stores.root.meta, meddle) as passed, suppress(EngineError):
                drop(stores, digest)
            if came == [None]:
                stores.collect()
                if hold in OF_BLOBS:
                    assert stores.content.verify(digest), at
                else:
                    assert stores.snapshotter("overlay").stat("found").key, at
        at += 1
    assert at > 3


def test_a_lease_holds_one_key_in_two_backends(world: World) -> None:
    world.run(importing(world.source, backend="overlay"), importing(world.docker, "d:1", "copy"))
    top = world.tops()["overlay"]
    with leased(world.stores.root.meta, "default") as lease:
        for backend in ("overlay", "copy"):
            world.stores.snapshotter(backend).stat(top, lease=lease)
        for name in (NAME, "d:1"):
            world.stores.images.remove(name)
        world.collect()
        for backend in ("overlay", "copy"):
            assert world.stores.snapshotter(backend).stat(top).key


def test_an_import_that_is_cancelled_leaves_others_what_they_share(world: World) -> None:
    """What it began is under its lease: that is given up only once nobody needs it."""
    world.run(importing(world.source))
    begun, scope = shared(world), trio.CancelScope()

    async def first(engine: Engine) -> None:
        with scope:
            await engine.import_image(world.source, name="other:1", snapshotter="overlay")

    async def second(engine: Engine) -> None:
        await begun.wait()

        def told(at: Step, *_: object) -> None:
            if at is Step.SHARE:
                scope.cancel()

        await engine.unpack(NAME, snapshotter="overlay", report=told)

    world.run(first, second)
    assert scope.cancelled_caught
    assert list(world.tops()) == ["overlay"]
    assert [image.name for image in world.stores.images.walk()] == [NAME]


def test_a_root_file_system_of_an_image_that_goes(world: World, tmp_path: Path) -> None:
    """From when it is unpacked on it does not need the name; nothing comes between."""
    source = layout(tmp_path / "small", [LAYERS[1]], compression="none")
    at, begun = 0, 0
    while True:
        world.run(importing(source, NAME))
        outcome = "done"
        try:
            passed = letting_go(world, at, preparing("overlay"), NAME)
        except* NotFound:
            outcome = "not found"
        if outcome == "done":
            begun = begun or at
            with suppress(NotFound):
                world.stores.images.remove(NAME)
            world.collect()
            (mount,) = world.stores.snapshotter("overlay").mounts("rootfs")
            with mounted([mount], world.target):
                assert (world.target / "b").exists()
            world.stores.release("rootfs")
        assert outcome == "done" or not begun, "it failed after it had begun"
        world.collect()
        assert not list(world.stores.snapshotter("overlay").walk())
        if outcome == "done" and at >= passed:
            break
        at += 1
        assert at < 60
    assert 5 < begun < 16 < at


def test_giving_up_leaves_what_others_are_writing(world: World) -> None:
    stores = world.stores
    with leased(stores.root.meta, "default") as other, leased(stores.root.meta, "default") as lease:
        stores.content.ingest("mine", lease=lease).close()
        with stores.content.ingest("theirs", lease=other) as writer:
            writer.write(b"data")
            stores.give_up(lease, seconds=1)
            assert [status.ref for status in stores.content.statuses()] == ["theirs"]
            assert writer.commit().size == 4
