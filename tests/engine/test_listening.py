"""Events: what became durable, in the order of commits, and nothing else; and who misses some knows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from engine import limits
from engine.app import Engine, open_engine
from engine.content.store import ContentStore
from engine.errors import NotFound
from engine.kv.schema import IMAGES
from engine.metadata.events import Topic
from engine.observing.listening import Listening, Missed
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.snapshots import Commit
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from tests.inline import workers_inline

LAYERS = [archive(member("a")), archive(member("b"))]


@pytest.fixture
def listening(tmp_path: Path, umask_0: None) -> Callable[..., list[Any]]:
    """Run work with an engine; return what was told meanwhile."""

    def run(work: Callable[[Engine], Any]) -> list[Any]:
        told: list[Any] = []

        async def main() -> None:
            async with open_engine(tmp_path / "root") as engine, trio.open_nursery() as nursery:
                with (
                    trio.fail_after(20),
                    workers_inline(pytest.MonkeyPatch(), engine.stores.root),
                    engine.events() as events,
                ):
                    nursery.start_soon(read, events, told)
                    await work(engine)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()

        trio.run(main)
        return told

    return run


async def read(events: Listening, into: list[Any]) -> None:
    async for event in events:
        into.append(event)  # noqa: PERF401  each is seen at once


def put(content: ContentStore, lease: str, data: bytes) -> str:
    with content.ingest(f"test-{data!r}", lease=lease) as writer:
        writer.write(data)
        return writer.commit().digest


@pytest.mark.root
def test_the_life_of_an_image(listening: Callable[..., list[Any]], tmp_path: Path) -> None:
    source = layout(tmp_path / "image", LAYERS, tag="x/y:1", compression="none")

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(source, snapshotter="overlay")).images
        engine.stores.images.label({"a": "b"}, image.name)
        await engine.unpack(image.name, snapshotter="overlay")  # which notes its use
        await engine.remove_image(image.name, collect=True)

    told = listening(work)
    topics = [event.topic for event in told]
    assert topics.count(Topic.CONTENT_CREATE) == topics.count(Topic.CONTENT_DELETE) == 4
    assert topics.count(Topic.SNAPSHOT_PREPARE) == topics.count(Topic.SNAPSHOT_COMMIT) == 2
    images = [event for event in told if event.topic.startswith("/images/")]
    assert [event.topic for event in images] == [
        Topic.IMAGE_CREATE,
        Topic.IMAGE_UPDATE,
        Topic.IMAGE_DELETE,
    ]
    assert {event.key for event in images} == {"docker.io/x/y:1"}
    assert images[1].labels == {"a": "b"}
    blobs = {event.key for event in told if event.topic is Topic.CONTENT_CREATE}
    assert images[0].target in blobs
    committed = [event for event in told if event.topic is Topic.SNAPSHOT_COMMIT]
    prepared = {event.key for event in told if event.topic is Topic.SNAPSHOT_PREPARE}
    assert {event.key for event in committed} == prepared
    removed = {event.key for event in told if event.topic is Topic.SNAPSHOT_REMOVE}
    assert {event.name for event in committed} == removed
    assert {event.snapshotter for event in committed} == {"overlay"}
    # The name comes after all that it stands for, and goes before.
    assert topics.index(Topic.IMAGE_CREATE) > topics.index(Topic.SNAPSHOT_COMMIT)
    assert topics.index(Topic.IMAGE_DELETE) < topics.index(Topic.CONTENT_DELETE)
    times = [event.at for event in told]
    assert times == sorted(times)


def heard(stores: Stores) -> tuple[Listening, Callable[[], list[Any]]]:
    listening = Listening(stores.root.meta, stores.namespace)

    def all_told() -> list[Any]:
        found = []
        while (event := listening._next()) is not None:
            found.append(event)
        return found

    return listening, all_told


def test_what_is_told_is_durable_by_then(stores: Stores) -> None:
    seen: list[bool] = []
    name = "docker.io/x/y:1"
    lease = stores.leases.create().id
    digest = put(stores.content, lease, b"{}")

    def hear(_changes: list[Any]) -> None:
        with stores.root.meta.read() as txn:
            seen.append(IMAGES.get(txn, "default", name) is not None)

    with stores.root.meta.heard_by(hear):
        descriptor = image_of(digest)
        stores.images.put_all({name: descriptor})
    assert seen == [True]


def image_of(digest: str) -> Any:
    return Descriptor(media_type="application/vnd.oci.image.manifest.v1+json", digest=digest, size=2)


def test_of_a_transaction_that_fails_nothing_is_told(stores: Stores) -> None:
    lease = stores.leases.create().id
    digest = put(stores.content, lease, b"{}")
    absent = image_of(digest_of(b"absent"))
    events, told = heard(stores)
    with events:
        with pytest.raises(NotFound):  # after the first was put
            stores.images.put_all({"docker.io/x/y:1": image_of(digest), "docker.io/x/z:1": absent})
        assert told() == []
        stores.images.put_all({"docker.io/x/y:1": image_of(digest)})
        assert [event.topic for event in told()] == [Topic.IMAGE_CREATE]
    stores.images.remove("docker.io/x/y:1")
    assert told() == [], "the block is over"


def test_nobody_listens_and_nothing_is_noted(stores: Stores) -> None:
    with stores.root.meta.write() as txn:
        assert txn.noted is None
    events, _ = heard(stores)
    with events, stores.root.meta.write() as txn:
        assert txn.noted == []


def test_snapshots_that_are_made_and_dropped(stores: Stores) -> None:
    backend = stores.snapshotter("copy")
    events, told = heard(stores)
    with events:
        backend.prepare("a")
        backend.commit(Commit(name="A", key="a"))
        backend.prepare("b", "A")
        backend.remove("b")
    shown = [(event.topic, event.key, event.parent, event.name) for event in told()]
    assert shown == [
        (Topic.SNAPSHOT_PREPARE, "a", "", ""),
        (Topic.SNAPSHOT_COMMIT, "a", "", "A"),
        (Topic.SNAPSHOT_PREPARE, "b", "A", ""),
        (Topic.SNAPSHOT_REMOVE, "b", "", ""),
    ]
    backend.cleanup()


def test_other_namespaces_are_not_told_of(stores: Stores) -> None:
    other = Stores(stores.root, "other", stores.platform)
    events, told = heard(stores)
    with events:
        put(other.content, other.leases.create().id, b"x")
        assert told() == []
        put(stores.content, stores.leases.create().id, b"x")
        (event,) = told()
        assert (event.key, event.size, event.namespace) == (digest_of(b"x"), 1, "default")
    other.close()


def test_who_reads_slowly_is_told_that_he_missed_some(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EVENTS", 3)
    lease = stores.leases.create().id
    events, told = heard(stores)
    with events:
        digests = [put(stores.content, lease, bytes([number])) for number in range(5)]
        missed, *rest = told()
        assert missed == Missed(2)
        assert [event.key for event in rest] == digests[2:]
        digests = [put(stores.content, lease, bytes([9, number])) for number in range(2)]
        assert [event.key for event in told()] == digests


def test_two_listen_and_each_has_all(stores: Stores) -> None:
    lease = stores.leases.create().id
    (first, told), (second, told_too) = heard(stores), heard(stores)
    with first:
        put(stores.content, lease, b"1")
        with second:
            put(stores.content, lease, b"2")
        put(stores.content, lease, b"3")
    assert [event.key for event in told()] == [digest_of(data) for data in (b"1", b"2", b"3")]
    assert [event.key for event in told_too()] == [digest_of(b"2")]


def test_events_of_threads_are_in_the_order_of_commits(stores: Stores) -> None:
    lease = stores.leases.create().id
    order: list[int] = []

    def hear(_changes: list[Any]) -> None:
        order.append(stores.root.meta.transactions())

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                data = bytes([number])
                nursery.start_soon(trio.to_thread.run_sync, put, stores.content, lease, data)

    with stores.root.meta.heard_by(hear):
        trio.run(work)
    assert len(order) >= 8
    assert order == sorted(set(order))


def test_gc_23_one_event_for_each_object_that_is_gone(stores: Stores) -> None:
    lease = stores.leases.create().id
    backend = stores.snapshotter("copy")
    for number in range(3):
        put(stores.content, lease, bytes([number]))
        backend.prepare(f"key {number}", lease=lease)
        backend.commit(Commit(name=f"name {number}", key=f"key {number}", lease=lease))
    stores.leases.delete(lease)
    events, told = heard(stores)
    with events:
        collected = stores.collect()
    gone = [(event.topic, event.key) for event in told()]
    assert len(collected.blobs) == len(collected.snapshots) == 3
    assert sorted(gone) == sorted(
        [
            *((Topic.CONTENT_DELETE, digest) for digest in collected.blobs),
            *((Topic.SNAPSHOT_REMOVE, node.key) for node in collected.snapshots),
        ]
    )
