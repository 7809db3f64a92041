"""Leases that callers make: what they hold, when they end, and who may end them."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from engine.app import Engine, open_engine
from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    NotSupported,
)
from engine.filters import parse_all
from engine.kv import keys
from engine.kv.schema import LEASES
from engine.metadata.leases import LeaseStore, expiry, leased
from engine.metadata.resources import Resource
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.times import rfc3339
from engine.unpack.workshop import open_workshop
from tests.clocks import HOUR, HandClock, clock_by_hand
from tests.conftest import AMD64
from tests.engine.image_files import HELLO, MANIFEST, WORLD, Files, records
from tests.meddling import meddled
from tests.processes import kill, ready

EXPIRE = "containerd.io/gc.expire"
ABSENT = Resource("content", digest_of(b"absent"))


@pytest.fixture
def clock() -> Iterator[HandClock]:
    with clock_by_hand() as found:
        yield found


def put(stores: Stores, data: bytes) -> Resource:
    with stores.content.ingest(f"put {digest_of(data)}", lease="") as writer:
        writer.write(data)
        writer.commit()
    return Resource("content", digest_of(data))


def kept(stores: Stores) -> set[str]:
    stores.collect()
    return {blob.digest for blob in stores.content.walk()}


# -- records ----------------------------------------------------------------------------------


def test_a_lease_is_made_found_and_removed(stores: Stores, clock: HandClock) -> None:
    lease = stores.leases.create("mine", labels={"a": "b"})
    assert (lease.id, lease.created, lease.owner) == ("mine", clock.at, None)
    assert lease.labels == {EXPIRE: rfc3339(clock.at + 24 * HOUR), "a": "b"}
    clock.at += 1
    other = stores.leases.create()
    assert stores.leases.get("mine") == lease
    assert stores.leases.walk() == [lease, other]
    stores.leases.delete("mine")
    assert stores.leases.walk() == [other]
    with pytest.raises(NotFound, match="no lease mine; `lamina leases ls`"):
        stores.leases.get("mine")


def test_a_lease_lives_as_long_as_is_said(stores: Stores, clock: HandClock) -> None:
    assert expiry(stores.leases.create("forever", life=None)) is None
    assert expiry(stores.leases.create("hour", life=HOUR)) == clock.at + HOUR
    labelled = stores.leases.create("labelled", life=HOUR, labels={EXPIRE: rfc3339(7)})
    assert expiry(labelled) == 7
    with pytest.raises(InvalidArgument, match="no lease lives that long"):
        stores.leases.create(life=10**21)


@pytest.mark.parametrize("name", ["a/b", ".", "-a", "a..b", "a b", "ä", "x" * 77, "a\n"])
def test_l_09_a_lease_is_called_as_containerd_has_it(stores: Stores, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a lease"):
        stores.leases.create(name)
    assert not records(stores)["leases"]


def test_a_name_is_for_one_lease_of_a_namespace(stores: Stores) -> None:
    stores.leases.create("mine")
    with pytest.raises(AlreadyExists):
        stores.leases.create("mine", labels={"other": "one"})
    LeaseStore(stores.root.meta, "other").create("mine")
    stores.leases.delete("mine")
    assert LeaseStore(stores.root.meta, "other").get("mine")


def test_leases_are_chosen_by_filters(stores: Stores) -> None:
    for name in ("a", "b"):
        stores.leases.create(name, labels={"team/x": name})

    def found(*texts: str) -> list[str]:
        return [lease.id for lease in stores.leases.walk(parse_all(texts))]

    assert found('labels."team/x"==b') == found("id==b") == ["b"]
    assert found("id==a", "id==b") == ["a", "b"]
    assert found("id==a,id==b") == []


def test_a_lease_that_cannot_be_read_is_told_of_and_can_be_removed(stores: Stores) -> None:
    held = put(stores, b"x")
    stores.leases.create("bad")
    stores.leases.add("bad", held)
    with stores.root.meta.write() as txn:
        txn.raw.put(keys.encode(("default", "bad")), b"\xc1", db=txn.databases[LEASES.name])
    assert stores.leases.walk() == []
    assert [lost.name for lost in stores.leases.damaged()] == ["bad"]
    assert kept(stores) == {held.id}
    stores.leases.delete("bad")
    assert kept(stores) == set()


# -- what they hold ---------------------------------------------------------------------------


def test_gc_05_what_a_lease_holds_stays_until_it_is_removed(stores: Stores) -> None:
    one, two = put(stores, b"1"), put(stores, b"2")
    stores.leases.create("mine")
    stores.leases.add("mine", one, two)
    stores.leases.remove("mine", two, two)
    assert stores.leases.resources("mine") == [one]
    assert kept(stores) == {one.id}
    stores.leases.delete("mine")
    assert kept(stores) == set()
    assert not records(stores)["lease_items"]


def test_gc_05_what_a_lease_holds_stays_until_it_expires(stores: Stores, clock: HandClock) -> None:
    held = put(stores, b"1")
    lease = stores.leases.create("mine", life=HOUR)
    stores.leases.add("mine", held)
    clock.at += HOUR - 1
    assert stores.leases.is_live(lease)
    assert kept(stores) == {held.id}
    clock.at += 1
    assert not stores.leases.is_live(lease)
    assert kept(stores) == set()
    assert not records(stores)["leases"]


def test_each_type_of_resource_is_held(stores: Stores) -> None:
    blob = put(stores, b"manifest")
    target = Descriptor(media_type=MANIFEST, digest=blob.id, size=8)
    overlay = stores.snapshotter("overlay")
    with leased(stores.root.meta, "default") as lease:
        overlay.prepare("active", lease=lease)
        stores.content.ingest("ref", lease=lease).close()
    stores.images.create("a", target, labels={EXPIRE: rfc3339(1)})
    held = [
        Resource("images", "docker.io/library/a:latest"),
        Resource("ingests", "ref"),
        Resource("snapshots/overlay", "active"),
    ]
    stores.leases.create("mine")
    stores.leases.add("mine", *held)
    assert sorted(stores.leases.resources("mine")) == held
    stores.collect()
    assert [image.name for image in stores.images.walk()] == [held[0].id]
    assert kept(stores) == {blob.id}
    assert [status.ref for status in stores.content.statuses()] == ["ref"]
    assert [info.key for info in overlay.walk()] == ["active"]
    stores.leases.delete("mine")
    stores.collect()
    left = records(stores)
    assert not left["images"]
    assert not left["blobs"]
    assert not left["snapshots"]


def test_gc_05_what_is_not_there_yet_is_held_from_its_first_moment(stores: Stores) -> None:
    stores.leases.create("mine")
    stores.leases.add("mine", ABSENT)
    assert kept(stores) == set()
    assert put(stores, b"absent") == ABSENT
    assert kept(stores) == {ABSENT.id}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Resource("containers", "x"), NotSupported),
        (Resource("leases", "x"), NotSupported),
        (Resource("content/x", ABSENT.id), NotSupported),
        (Resource("", "x"), NotSupported),
        (Resource("content", "sha256:12"), InvalidArgument),
        (Resource("content", ""), InvalidArgument),
        (Resource("images", "UPPER//case"), InvalidArgument),
        (Resource("ingests", ""), InvalidArgument),
        (Resource("snapshots", "key"), InvalidArgument),
        (Resource("snapshots/", "key"), InvalidArgument),
        (Resource("snapshots/overlay", ""), InvalidArgument),
    ],
)
def test_what_no_lease_holds_is_refused_whole(
    stores: Stores, wrong: Resource, error: type[EngineError]
) -> None:
    stores.leases.create("mine")
    for change in (stores.leases.add, stores.leases.remove):
        with pytest.raises(error):
            change("mine", ABSENT, wrong)
    assert stores.leases.resources("mine") == []


def test_no_lease_holds_nothing(stores: Stores) -> None:
    for call in (
        lambda: stores.leases.resources("absent"),
        lambda: stores.leases.add("absent", ABSENT),
        lambda: stores.leases.remove("absent", ABSENT),
        lambda: stores.leases.delete("absent"),
        lambda: stores.leases.check("absent"),
        lambda: stores.leases.take_over("absent", []),
    ):
        with pytest.raises(NotFound, match="no lease absent"):
            call()


# -- whose they are ---------------------------------------------------------------------------

_AT_WORK = """
import sys
from pathlib import Path
from engine.metadata.leases import leased
from engine.root import Root
with Root(Path(sys.argv[1])) as root, leased(root.meta, "default"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_gc_14_only_its_owner_ends_the_lease_of_work(stores: Stores) -> None:
    process = ready(_AT_WORK, stores.root.path)
    try:
        (theirs,) = stores.leases.walk()
        with leased(stores.root.meta, "default") as ours:
            stores.leases.create("mine")
            for name in (theirs.id, ours):
                with pytest.raises(FailedPrecondition, match=r"that of process \d+, which is at work"):
                    stores.leases.delete("mine", name)
            assert len(stores.leases.walk()) == 3
    finally:
        kill(process)
    stores.leases.delete("mine", theirs.id)
    assert stores.leases.walk() == []


# -- work for a lease -------------------------------------------------------------------------


def image(folder: Path, *layers: bytes) -> Path:
    files = Files()
    return files.name(files.image(layers)).folder(folder)


def run(stores: Stores, *calls: Callable[[Engine], Awaitable[None]]) -> None:
    """Call functions with an engine on `stores`, one after the other."""

    async def main() -> None:
        async with open_workshop(stores.root) as workshop:
            for call in calls:
                await call(Engine(stores, workshop))

    trio.run(main)


def everything(stores: Stores) -> tuple[int, int]:
    stores.collect()
    return len([*stores.content.walk()]), len([*stores.snapshotter("overlay").walk()])


@pytest.mark.root
def test_gc_05_what_an_import_makes_and_finds_joins_a_lease(stores: Stores, tmp_path: Path) -> None:
    source = image(tmp_path / "image", HELLO, WORLD)
    for name in ("first", "second"):
        stores.leases.create(name)

        async def work(engine: Engine, lease: str = name) -> None:
            await engine.using(lease).import_image(source, snapshotter="overlay")

        run(stores, work)
    held = set(stores.leases.resources("first"))
    assert {one.type for one in held} == {"content", "snapshots/overlay"}
    assert set(stores.leases.resources("second")) <= held
    stores.images.remove("example.org/a:1")
    whole = everything(stores)
    assert whole == (4, 2)
    stores.leases.delete("first")
    assert everything(stores) == whole
    stores.leases.delete("second")
    assert everything(stores) == (0, 0)


@pytest.mark.root
def test_what_unpack_and_prepare_need_joins_a_lease(stores: Stores, tmp_path: Path) -> None:
    source = image(tmp_path / "image", HELLO, WORLD)
    stores.leases.create("mine")

    async def work(engine: Engine) -> None:
        await engine.import_image(source)
        await engine.using("mine").prepare("key", "example.org/a:1", snapshotter="overlay")
        await engine.release("key")

    run(stores, work)
    stores.images.remove("example.org/a:1")
    assert everything(stores)[1] == 2


@pytest.mark.root
def test_an_import_that_fails_leaves_nothing_with_the_lease(stores: Stores, tmp_path: Path) -> None:
    files = Files()
    bad = files.image([HELLO], layers=[files.blob(WORLD, "application/vnd.oci.image.layer.v1.tar")])
    source = files.name(bad).folder(tmp_path / "image")
    stores.leases.create("mine")

    async def work(engine: Engine) -> None:
        with pytest.raises(EngineError):
            await engine.using("mine").import_image(source, snapshotter="overlay")

    run(stores, work)
    assert stores.leases.resources("mine") == []
    assert everything(stores) == (0, 0)


@pytest.mark.root
def test_of_several_images_the_good_join_the_lease(stores: Stores, tmp_path: Path) -> None:
    files = Files()
    layer = files.blob(WORLD, "application/vnd.oci.image.layer.v1.tar")
    # What it says that its layer is nobody has: else that would serve for it.
    files.name(files.image([archive(member("lie"))], layers=[layer]), "example.org/bad:1")
    files.name(files.image([HELLO]), "example.org/good:1")
    source = files.folder(tmp_path / "image")
    stores.leases.create("mine")

    async def work(engine: Engine) -> None:
        done = await engine.using("mine").import_image(source, snapshotter="overlay")
        assert ([one.name for one in done.images], len(done.failed)) == (["example.org/good:1"], 1)

    run(stores, work)
    stores.images.remove("example.org/good:1")
    assert everything(stores) == (3, 1)
    stores.leases.delete("mine")
    assert everything(stores) == (0, 0)


@pytest.mark.root
def test_work_for_a_lease_that_is_none_does_not_begin(
    stores: Stores, tmp_path: Path, clock: HandClock
) -> None:
    source = image(tmp_path / "image", HELLO)
    stores.leases.create("ended", life=HOUR)
    clock.at += HOUR

    async def work(engine: Engine) -> None:
        for name, error in (("absent", NotFound), ("ended", FailedPrecondition)):
            with pytest.raises(error):
                await engine.using(name).import_image(source)

    run(stores, work)
    assert not records(stores)["blobs"]


@pytest.mark.root
def test_a_lease_that_is_removed_meanwhile_is_told_of(stores: Stores, tmp_path: Path) -> None:
    source = image(tmp_path / "image", HELLO)
    stores.leases.create("mine")

    def remove(*_about: object) -> None:
        with suppress(NotFound):
            stores.leases.delete("mine")

    async def work(engine: Engine) -> None:
        with pytest.raises(NotFound, match="no lease mine"):
            await engine.using("mine").import_image(source, report=remove)

    run(stores, work)
    assert [one.name for one in stores.images.walk()] == ["example.org/a:1"]
    assert everything(stores) == (3, 0)


@pytest.mark.root
def test_gc_05_nothing_comes_between_work_and_the_lease_that_it_is_for(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is removed, and all that nothing holds collected, before each transaction."""
    source = image(tmp_path / "image", HELLO)
    stores.leases.create("mine")

    def meddle(_passed: int) -> None:
        with suppress(NotFound):
            stores.images.remove("example.org/a:1")
        stores.collect()

    async def work(engine: Engine) -> None:
        await engine.using("mine").import_image(source)

    with meddled(monkeypatch, stores.root.meta, meddle) as passed:
        run(stores, work)
    assert len(passed) > 10
    assert len(stores.leases.resources("mine")) == 3
    assert everything(stores) == (3, 0)


@pytest.mark.root
def test_an_engine_removes_and_collects_at_once(tmp_path: Path) -> None:
    source = image(tmp_path / "image", HELLO)

    async def main() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            (named,) = (await engine.import_image(source)).images
            other = Descriptor(media_type=MANIFEST, digest=digest_of(b"other"), size=5)
            with pytest.raises(NotFound, match="does not mean"):
                await engine.remove_image(named.name, target=other)
            assert await engine.remove_image(named.name, target=named.target) is None
            assert len([*engine.stores.content.walk()]) == 3
            await engine.import_image(source)
            collected = await engine.remove_image(named.name, collect=True)
            assert collected is not None
            assert len(collected.blobs) == 3
            assert [*engine.stores.content.walk()] == []

    trio.run(main)
