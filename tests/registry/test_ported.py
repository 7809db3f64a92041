"""What the tests of other engines ask of a pull, by ID (docs/testing.md); the rest is in other files."""

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from engine.app import Engine
from engine.errors import (
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Refused,
)
from engine.images.states import parts_of
from engine.labels import snapshot_ref
from engine.oci.digest import digest_of
from engine.progress import Step
from engine.registry.client import Client, open_client
from engine.snapshots import Info, Kind
from engine.stores import open_stores
from engine.testing.archives import archive, member
from engine.testing.fake_registry import FakeRegistry, respond, response
from tests.command import dump, lamina
from tests.meddling import meddled
from tests.registry.asking import Served
from tests.registry.pulls import BIG, HELLO, NOTHING, ON_AMD64, Held, access, engine_at, here, left
from tests.support import tree_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

OTHER = archive(member("other", data=b"other\n"))
Work = Callable[[Engine, Client], Awaitable[Any]]


@pytest.fixture
def running(tmp_path: Path) -> Callable[[Work], Any]:
    """Run something with an engine of this test's store and a client."""

    def running(work: Work) -> Any:
        async def run() -> Any:
            async with engine_at(tmp_path) as engine, open_client(access()) as client:
                with trio.fail_after(60):
                    return await work(engine, client)

        return trio.run(run)

    return running


def pulling(served: Served, **options: Any) -> Work:
    options = {"snapshotter": "overlay", **options}
    return lambda engine, client: engine.pull(str(served.reference), client, **options)


def served_with(served: Served, **changes: Any) -> None:
    """Have the name mean a manifest that differs in some members."""
    data = json.dumps(json.loads(served.data) | changes).encode()
    served.registry.put("a", "manifests", data, served.manifest.media_type, "1")


def infos(engine: Engine, backend: str = "overlay") -> list[Info]:
    return list(engine.stores.snapshotter(backend).walk())


# -- MS: Mesos' store -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_ms_04_closing_an_engine_ends_its_pulls(
    is_cancelled: bool,
    tmp_path: Path,
    served: Served,
    held: Held,
    registry: FakeRegistry,
    running: Callable[[Work], Any],
) -> None:
    """Whoever still waits is told; what is left is what the next pull goes on with."""
    registry.plan(served.layers[1].digest, held.fault())

    async def run() -> None:
        async with (
            open_client(access()) as client,
            trio.open_nursery() as nursery,
            engine_at(tmp_path) as engine,
        ):
            nursery.start_soon(pull, engine, client)
            await trio.to_thread.run_sync(held.came.wait)
            await here(engine, served.layers[0].key)
            if is_cancelled:
                nursery.cancel_scope.cancel()

    async def pull(engine: Engine, client: Client) -> None:
        with pytest.raises((FailedPrecondition, trio.Cancelled)):
            await pulling(served)(engine, client)

    trio.run(run)
    held.go_on.set()
    found = left(tmp_path)
    assert len(found["leases"]) == 1
    assert all(one["expected"] == served.layers[1].digest for one in found["ingests"])
    before = registry.count(served.layers[0].digest)
    running(pulling(served))
    assert registry.count(served.layers[0].digest) == before
    assert left(tmp_path) == NOTHING


@pytest.mark.parametrize("what", ["schema 1", "a chart", "no JSON"])
def test_ms_05_what_is_no_image_has_no_effect(
    what: str, tmp_path: Path, served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    if what == "a chart":
        config = json.loads(served.data)["config"]
        served_with(served, config=config | {"mediaType": "application/vnd.cncf.helm.config.v1+json"})
    else:
        kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
        media_type = kind if what == "schema 1" else served.manifest.media_type
        registry.put(
            "a", "manifests", b'{"schemaVersion": 1}'[: -(what == "no JSON") or None], media_type, "1"
        )
    with pytest.raises(Refused):
        running(pulling(served))
    assert registry.count("blobs") == 0
    assert dump(tmp_path)["blobs"] == []
    assert left(tmp_path) == NOTHING


def test_ms_06_cri_02_what_is_no_name_has_no_effect(tmp_path: Path, registry: FakeRegistry) -> None:
    done = lamina(tmp_path / "root", "pull", f"{registry.name}/A:1", code=2)
    assert "/A:1" in done.stderr
    assert not (tmp_path / "root").exists()
    assert not registry.asked


@pytest.mark.parametrize("gone", ["blob", "snapshot", "both"])
def test_ms_08_up_20g_what_is_missing_is_brought_back_and_no_more(
    gone: str, served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    async def work(engine: Engine, client: Client) -> None:
        await pulling(served)(engine, client)
        stores = engine.stores
        image = stores.resolve(stores.images.get(str(served.reference)).target)
        if gone != "snapshot":
            stores.content.delete(served.layers[1].key)
        if gone != "blob":
            stores.snapshotter("overlay").remove(image.chain[1])
        registry.asked.clear()
        pulled = await pulling(served)(engine, client)
        assert pulled.unpacked.applied == (gone != "blob")
        # For another backend all is applied, nothing fetched.
        assert (await pulling(served, snapshotter="copy")(engine, client)).unpacked.applied == 2
        assert registry.count("blobs") == (gone != "snapshot")
        stores.content.verify(served.layers[1].key)
        assert parts_of(stores, image).unpacked.keys() == {"overlay", "copy"}

    running(work)


def test_ms_12_a_cancel_after_the_end_does_nothing(
    served: Served, running: Callable[[Work], Any]
) -> None:
    async def work(engine: Engine, client: Client) -> None:
        with trio.CancelScope() as scope:
            pulled = await pulling(served)(engine, client)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.stores.images.get(pulled.image.name) == pulled.image
        assert not engine.stores.pulls.walk()

    running(work)


def test_ms_24_up_20l_no_layers(
    tmp_path: Path, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    empty = Served(registry, ())

    async def work(engine: Engine, client: Client) -> None:
        pulled = await pulling(empty)(engine, client)
        assert pulled.unpacked.chain_id == ""
        assert await engine.prepare("root", pulled.image.name, snapshotter="overlay")
        assert snapshot_ref("overlay") not in engine.stores.content.info(empty.config.key).labels
        await engine.release("root", snapshotter="overlay")

    running(work)
    assert left(tmp_path) == NOTHING


def test_ms_27_up_15_a_layer_that_occurs_twice_is_fetched_once(
    tmp_path: Path, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    one, two = (archive(member("x", data=data)) for data in (b"1", b"22"))
    twice = Served(registry, (one, two, one))

    async def work(engine: Engine, client: Client) -> None:
        pulled = await pulling(twice)(engine, client)
        assert pulled.unpacked.layers == 3
        assert len(infos(engine)) == 3

    running(work)
    assert registry.count(f"blobs/{twice.layers[0].digest}") == 1
    with open_stores(tmp_path, "default", ON_AMD64) as stores:
        image = stores.resolve(stores.images.get(str(twice.reference)).target)
        tree = tree_of(stores, "overlay", image.chain[-1], tmp_path / "mnt")
    assert tree[b"x"].size == 1


@pytest.mark.parametrize("part", ["config", "layer"])
def test_ms_28_bytes_of_another_digest_are_no_part_of_an_image(
    part: str, tmp_path: Path, served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    blob = served.config if part == "config" else served.layers[1]
    path = f"/a/blobs/{blob.digest}"
    media_type, data = registry.content[path]
    registry.content[path] = media_type, data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises((DigestMismatch, Refused)):
        running(pulling(served))
    found = dump(tmp_path)
    assert found["images"] == []
    assert blob.digest not in {one["digest"] for one in found["blobs"]}
    registry.content[path] = media_type, data
    running(pulling(served))


# -- CRI: cri-containerd ----------------------------------------------------------------------------


def test_cri_04_cri_05_another_name_is_no_other_image(
    served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    path = f"/a/manifests/{served.manifest.digest}"
    registry.content["/a/manifests/2"] = registry.content[path]
    tagged, other = str(served.reference), f"{registry.name}/a:2"
    by_digest = f"{registry.name}/a@{served.manifest.digest}"

    async def work(engine: Engine, client: Client) -> None:
        stores = engine.stores
        first = (await engine.pull(tagged, client, snapshotter="overlay")).image
        before = sorted(blob.digest for blob in stores.content.walk()), infos(engine)
        registry.asked.clear()
        for name in (tagged, other, by_digest):
            image = (await engine.pull(name, client, snapshotter="overlay")).image
            assert (image.name, image.target) == (name, first.target)
        assert registry.count("blobs") == 0
        assert (sorted(blob.digest for blob in stores.content.walk()), infos(engine)) == before
        assert {image.name for image in stores.images.walk()} == {tagged, other, by_digest}

    running(work)


@pytest.mark.parametrize("wrong", ["no JSON", "too few layers", "too many layers"])
def test_cri_07_up_03_a_config_that_does_not_fit_is_told_before_any_layer(
    wrong: str, served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    manifest = json.loads(served.data)
    if wrong == "no JSON":
        digest = registry.put("a", "blobs", b"{", served.config.media_type)
        served_with(served, config=manifest["config"] | {"digest": digest, "size": 1})
    else:
        layers = manifest["layers"]
        served_with(served, layers=layers[:1] if wrong == "too few layers" else layers * 2)

    async def work(engine: Engine, client: Client) -> None:
        with pytest.raises(Refused):
            await pulling(served)(engine, client)
        assert infos(engine) == []
        assert not engine.stores.images.walk()

    running(work)
    for layer in served.layers:
        assert registry.count(layer.digest) == 0


def test_cri_08_up_02_up_07_a_name_comes_after_the_last_layer(
    served: Served, registry: FakeRegistry, held: Held, running: Callable[[Work], Any]
) -> None:
    """Layers are unpacked while others are on their way; nothing is named, nor half a snapshot."""
    registry.plan(served.layers[1].digest, held.fault())

    async def work(engine: Engine, client: Client) -> None:
        backend = engine.stores.snapshotter("overlay")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pulling(served), engine, client)
            await trio.to_thread.run_sync(held.came.wait)
            chain = [digest_of(HELLO)]
            while not [one for one in backend.walk() if one.kind is Kind.COMMITTED]:  # noqa: ASYNC110  a process tells
                await trio.sleep(0.001)
            assert [one.key for one in backend.walk() if one.kind is Kind.COMMITTED] == chain
            for one in backend.walk():
                if one.kind is not Kind.COMMITTED:
                    key, _, name = one.key.partition(" ")
                    assert key.startswith("extract-")
                    assert one.labels["containerd.io/snapshot.ref"] == name
            assert not engine.stores.images.walk()
            held.go_on.set()
        assert engine.stores.images.walk()
        assert {one.kind for one in backend.walk()} == {Kind.COMMITTED}

    running(work)


def test_cri_09_up_17_what_fails_fails_at_once(
    served: Served, registry: FakeRegistry, held: Held, running: Callable[[Work], Any]
) -> None:
    """An error of one layer ends the fetch of another, though nobody answers that."""
    registry.plan(served.layers[1].digest, held.fault())

    def after(connection: Any, asked: Any, good: bytes) -> bool:
        held.came.wait(30)
        return respond(response(403))(connection, asked, good)

    registry.plan(served.layers[0].digest, after, times=5)

    async def work(engine: Engine, client: Client) -> None:
        with pytest.raises(PermissionDenied):
            await pulling(served)(engine, client)
        assert not held.go_on.is_set()
        assert not engine.stores.images.walk()
        assert infos(engine) == []

    running(work)


def test_cri_11_each_layer_says_how_far_it_is(served: Served, running: Callable[[Work], Any]) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def report(step: Step, item: str, total: int, done: int, /) -> None:
        if step is Step.FETCH:
            seen.setdefault(item, []).append((total, done))

    running(pulling(served, report=report))
    for layer in served.layers:
        assert {total for total, _ in seen[layer.digest]} == {layer.size}
        counts = [done for _, done in seen[layer.digest]]
        assert counts == sorted(counts)
        assert counts[-1] == layer.size


def test_cri_12_up_20c_removed_and_collected_at_any_moment_of_a_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: FakeRegistry
) -> None:
    """With both before each transaction: the name is there and whole, or it is not there."""
    served = Served(registry, (HELLO, OTHER))

    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            stores = engine.stores
            name = str(served.reference)

            def meddle(_number: int) -> None:
                with suppress(NotFound):
                    image = stores.images.get(name)
                    resolved = stores.resolve(image.target)
                    for part in (*resolved.path, resolved.manifest.config, *resolved.manifest.layers):
                        stores.content.verify(part.key)
                    assert "overlay" in parts_of(stores, resolved).unpacked
                    stores.images.remove(name)
                stores.collect()

            for _ in range(2):  # from nothing, and with what the first left
                with meddled(monkeypatch, stores.root.meta, meddle) as passed:
                    await engine.pull(name, client, snapshotter="overlay")
                assert len(passed) > 10
            stores.collect()
            assert not [*stores.content.walk()]
            assert infos(engine) == []

    trio.run(run)
    assert left(tmp_path) == NOTHING


# -- UP: containerd's unpacker ----------------------------------------------------------------------


def test_up_01_the_config_comes_before_the_layers(
    served: Served, registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    running(pulling(served))
    paths = [one.path.rpartition("/")[2] for one in registry.asked if "blobs" in one.path]
    assert paths[0] == served.config.digest


def test_up_05_up_06_up_14_what_is_unpacked_is_not_fetched(
    registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    base = Served(registry, (HELLO, OTHER))

    async def work(engine: Engine, client: Client) -> None:
        await pulling(base, keep_blobs=False)(engine, client)
        await engine.collect()
        above = Served(registry, (HELLO, OTHER, BIG))
        registry.asked.clear()
        pulled = await pulling(above, keep_blobs=False)(engine, client)
        assert pulled.unpacked.applied == 1
        asked = {one.path.rpartition("/")[2] for one in registry.asked if "blobs" in one.path}
        assert asked == {above.config.digest, above.layers[2].digest}
        registry.asked.clear()
        await pulling(above, keep_blobs=False)(engine, client)
        assert registry.count("blobs") == 0

    running(work)


def test_up_13_the_config_holds_what_is_unpacked(served: Served, running: Callable[[Work], Any]) -> None:
    async def work(engine: Engine, client: Client) -> None:
        top = (await pulling(served)(engine, client)).unpacked.chain_id
        assert engine.stores.content.info(served.config.key).labels[snapshot_ref("overlay")] == top
        await engine.collect()
        assert len(infos(engine)) == 2

    running(work)


def test_up_20f_two_manifests_of_one_config(
    registry: FakeRegistry, running: Callable[[Work], Any]
) -> None:
    """As one image packed in two ways: each has its own blobs, and both one chain."""
    packed = Served(registry, (HELLO, OTHER))
    manifest = json.loads(packed.data)
    plain = []
    for layer, data in zip(manifest["layers"], (HELLO, OTHER), strict=True):
        media_type = layer["mediaType"].removesuffix("+gzip")
        digest = registry.put("a", "blobs", data, media_type)
        plain.append({"mediaType": media_type, "digest": digest, "size": len(data)})
    data = json.dumps(manifest | {"layers": plain}).encode()
    registry.put("a", "manifests", data, packed.manifest.media_type, "plain")
    names = [str(packed.reference), f"{registry.name}/a:plain"]

    async def work(engine: Engine, client: Client) -> None:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(lambda n: engine.pull(n, client, snapshotter="overlay"), name)
        await engine.collect()
        for layer in (*manifest["layers"], *plain):
            engine.stores.content.verify(layer["digest"])
        assert len(infos(engine)) == 2
        for name in names:
            await engine.unpack(name, snapshotter="copy")

    running(work)


def test_up_20i_nothing_of_a_pull_that_ended_goes_on(
    served: Served, registry: FakeRegistry, held: Held, running: Callable[[Work], Any]
) -> None:
    registry.plan(served.layers[0].digest, held.fault())

    async def work(engine: Engine, client: Client) -> None:
        with trio.move_on_after(30) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pulling(served), engine, client)
                await trio.to_thread.run_sync(held.came.wait)
                scope.cancel()
        assert scope.cancelled_caught
        asked = len(registry.asked)
        held.go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(registry.asked) == asked
        with pytest.raises(EngineError):
            engine.stores.images.get(str(served.reference))

    running(work)
