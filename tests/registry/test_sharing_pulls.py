"""Pulls at once: one for those who want the same of the same client, blobs once for all."""

import json
from pathlib import Path

import pytest
import trio

from engine.errors import EngineError, NotFound, PermissionDenied, Unavailable
from engine.images.states import parts_of
from engine.kv.schema import EXTENT
from engine.registry.client import open_client
from engine.registry.credentials import Credential
from engine.testing.archives import archive, member
from engine.testing.fake_registry import FakeRegistry, cut, reset, respond, response
from tests.command import lamina_json
from tests.engine.image_files import AMD64, ARM64, INDEX, MANIFEST
from tests.registry.asking import Served
from tests.registry.pulls import HELLO, NOTHING, Held, access, engine_at, here, left

pytestmark = pytest.mark.root


def test_ms_10_one_pull_for_all_who_want_the_same(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            pulled = []

            async def pull() -> None:
                pulled.append(await engine.pull(str(served.reference), client, snapshotter="overlay"))

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(pull)
            assert len({one.image.target.digest for one in pulled}) == 1
            assert len(pulled) == 10

    trio.run(run)
    assert len(registry.asked) == 5
    assert left(tmp_path) == NOTHING


def test_ms_11_cri_10_the_last_who_is_cancelled_ends_it(
    tmp_path: Path, registry: FakeRegistry, served: Served, held: Held, umask_0: None
) -> None:
    registry.plan(served.layers[1].digest, held.fault())

    async def run() -> None:
        name = str(served.reference)
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            scopes = [trio.CancelScope() for _ in range(3)]
            ended: list[int] = []

            async def pull(number: int) -> None:
                with scopes[number]:
                    await engine.pull(name, client, snapshotter="overlay")
                ended.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(pull, number)
                await trio.to_thread.run_sync(held.came.wait)
                await here(engine, served.layers[0].key)
                scopes[0].cancel()
                scopes[1].cancel()
                with trio.fail_after(30):
                    while len(ended) < 2:
                        await trio.lowlevel.checkpoint()
                assert sorted(ended) == [0, 1]
                assert engine._shop.pulls._flights
                scopes[2].cancel()
            assert sorted(ended) == [0, 1, 2]
            assert not engine._shop.pulls._flights
            assert not engine.stores.images.walk()
            (pull_left,) = engine.stores.pulls.walk()
            assert (pull_left.reference, pull_left.owner) == (name, "")
            # A new pull is one of its own, and what was there is not fetched again.
            held.go_on.set()
            await engine.pull(name, client, snapshotter="overlay")

    trio.run(run)
    assert registry.count(served.layers[0].digest) == 1
    assert registry.count(served.config.digest) == 1
    assert left(tmp_path) == NOTHING


def test_ms_13_nobody_joins_a_pull_that_failed(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    registry.plan(served.layers[0].digest, respond(response(403)))

    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            name = str(served.reference)
            with pytest.raises(PermissionDenied):
                await engine.pull(name, client, snapshotter="overlay")
            await engine.pull(name, client, snapshotter="overlay")

    trio.run(run)
    assert left(tmp_path) == NOTHING


def test_ms_14a_another_backend_is_another_pull(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            name = str(served.reference)
            async with trio.open_nursery() as nursery:
                for backend in ("overlay", "copy", None):
                    nursery.start_soon(lambda b: engine.pull(name, client, snapshotter=b), backend)
            (image,) = engine.stores.images.walk()
            resolved = engine.stores.resolve(image.target)
            assert parts_of(engine.stores, resolved).unpacked.keys() == {"overlay", "copy"}

    trio.run(run)
    for blob in (served.config, *served.layers):
        assert registry.count(f"blobs/{blob.digest}") == 1
    assert left(tmp_path) == NOTHING


def test_ms_14b_who_may_not_is_not_let_in_by_another(
    tmp_path: Path, registry: FakeRegistry, served: Served, held: Held, umask_0: None
) -> None:
    registry.realm, registry.user, registry.password = "basic", "u", "good"
    registry.plan(served.layers[1].digest, held.fault())

    async def run() -> None:
        name = str(served.reference)
        good = access(credentials=lambda _: Credential("u", "good"))
        bad = access(credentials=lambda _: Credential("u", "bad"))
        async with (
            engine_at(tmp_path) as engine,
            open_client(good) as mine,
            open_client(bad) as other,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(lambda: engine.pull(name, mine, snapshotter="overlay"))
            await trio.to_thread.run_sync(held.came.wait)
            with pytest.raises(PermissionDenied):
                await engine.pull(name, other, snapshotter="overlay")
            held.go_on.set()

    trio.run(run)
    (image,) = lamina_json(tmp_path, "images")
    assert image["unpacked"]


def test_ms_14c_a_pull_that_ends_does_not_end_the_next_of_its_name(
    tmp_path: Path, registry: FakeRegistry, served: Served, held: Held, umask_0: None
) -> None:
    registry.plan(served.layers[1].digest, held.fault())

    async def run() -> None:
        name = str(served.reference)
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: engine.pull(name, client, snapshotter="overlay"))
                await trio.to_thread.run_sync(held.came.wait)
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    # The first is on its way out.
                    held.go_on.set()
                    pulled = await engine.pull(name, client, snapshotter="overlay")
                    assert pulled.image.name == name
            assert not engine._shop.pulls._flights

    trio.run(run)
    assert left(tmp_path) == NOTHING


def test_ms_14d_cri_06_a_blob_is_fetched_once_whatever_its_image_is_called(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    names = [str(served.reference), f"{registry.name}/a@{served.manifest.digest}"]

    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(lambda n: engine.pull(n, client, snapshotter="overlay"), name)
            assert {image.name for image in engine.stores.images.walk()} == set(names)

    trio.run(run)
    for blob in (served.config, *served.layers):
        assert registry.count(f"blobs/{blob.digest}") == 1
    assert left(tmp_path) == NOTHING


def test_what_a_failed_pull_fetched_outlasts_a_collection(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    registry.plan(served.layers[1].digest, cut(EXTENT + 5000))
    registry.plan(served.layers[1].digest, reset(), times=100)

    async def run() -> None:
        name = str(served.reference)
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            with pytest.raises(Unavailable):
                await engine.pull(name, client, snapshotter="overlay")
            await engine.collect()
            registry._planned.clear()
            registry.asked.clear()
            await engine.pull(name, client, snapshotter="overlay")

    trio.run(run)
    assert registry.count("blobs") == 1
    (asked,) = (one for one in registry.asked if "blobs" in one.path)
    assert int(asked.headers["range"].strip("bytes=-")) >= EXTENT
    assert left(tmp_path) == NOTHING


def test_ms_09_a_lease_of_the_callers_holds_what_was_pulled(
    tmp_path: Path, served: Served, umask_0: None
) -> None:
    async def run() -> None:
        name = str(served.reference)
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            lease = engine.stores.leases.create("mine")
            using = engine.using(lease.id)
            async with trio.open_nursery() as nursery:
                for one in (engine, using):
                    nursery.start_soon(lambda e: e.pull(name, client, snapshotter="overlay"), one)
            await engine.remove_image(name)
            assert not (await engine.collect()).blobs
            engine.stores.leases.delete("mine")
            assert len((await engine.collect()).blobs) == 4

    trio.run(run)


# -- what is kept ---------------------------------------------------------------------------------


def test_up_14_without_blobs_an_image_can_be_run_and_nothing_else(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    name = str(served.reference)

    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            await engine.pull(name, client, snapshotter="overlay", keep_blobs=False)
            await engine.collect()
            assert {blob.digest for blob in engine.stores.content.walk()} == {
                served.config.digest,
                served.manifest.digest,
            }
            assert await engine.prepare("c", name, snapshotter="overlay")
            # What is unpacked is not fetched again,
            registry.asked.clear()
            await engine.pull(name, client, snapshotter="overlay", keep_blobs=False)
            assert registry.count("blobs") == 0
            with pytest.raises(NotFound):
                await engine.unpack(name, snapshotter="copy")
            # but for who wants the blobs, too.
            await engine.pull(name, client, snapshotter="overlay")
            assert registry.count("blobs") == 2
            await engine.collect()
            await engine.unpack(name, snapshotter="copy")

    trio.run(run)
    assert left(tmp_path)["ingests"] == []


def test_blobs_are_not_dropped_without_anything_unpacked(tmp_path: Path, served: Served) -> None:
    async def run() -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            with pytest.raises(EngineError, match="unpacked"):
                await engine.pull(str(served.reference), client, keep_blobs=False)

    trio.run(run)


def test_up_20k_all_platforms(tmp_path: Path, registry: FakeRegistry, umask_0: None) -> None:
    other = Served(registry, (archive(member("other", data=b"arm")),))
    mine = Served(registry, (HELLO,))
    said = Served(registry, (archive(member("said", data=b"who built it")),))
    entries = [
        {"mediaType": MANIFEST, "digest": one.manifest.digest, "size": one.manifest.size} | about
        for one, about in (
            (other, {"platform": ARM64}),
            (mine, {"platform": AMD64}),
            (said, {"platform": {"os": "unknown", "architecture": "unknown"}}),
        )
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    registry.put("a", "manifests", index, INDEX, "1")

    async def run() -> None:
        name = str(mine.reference)
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            pulled = await engine.pull(name, client, snapshotter="overlay", all_platforms=True)
            assert pulled.unpacked
            assert pulled.unpacked.applied == 1
            await engine.collect()
            for one in (other, mine, said):
                for part in (one.manifest, one.config, *one.layers):
                    engine.stores.content.info(part.key)

    trio.run(run)
    assert left(tmp_path) == NOTHING
    assert len(registry.asked) == 1 + 1 + 3 + 6
