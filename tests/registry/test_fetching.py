"""Blobs into the store: whole or not at all, from where they stopped, asked of whom that makes sense."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Barrier, Event, get_ident
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from engine import limits
from engine.content.growing import BATCH
from engine.errors import (
    DigestMismatch,
    EngineError,
    InvalidArgument,
    NotFound,
    Refused,
    ResourceExhausted,
    Unavailable,
)
from engine.failpoints import armed
from engine.kv.schema import EXTENT, Blob
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.oci.reference import parse_reference
from engine.progress import Step
from engine.registry.bandwidth import Bandwidth
from engine.registry.client import Access, open_client
from engine.registry.fetching import Fetcher, Sought
from engine.registry.hosts import default_host
from engine.registry.lanes import Lanes
from engine.stores import Stores
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, cut, reset, respond, response, stall
from engine.unpack.arrivals import Arrival
from tests.engine.image_files import LAYER
from tests.registry.asking import HURRIED, QUICK

DATA = random.Random("blob").randbytes(3 * EXTENT + 1000)
SMALL = b"small"


def sought(registry: FakeRegistry, data: bytes, **changes: Any) -> Sought:
    digest = registry.put("a", "blobs", data, LAYER)
    descriptor = Descriptor(media_type=LAYER, digest=digest, size=len(data))
    reference = parse_reference(f"{registry.name}/a:1")
    return replace(Sought(reference=reference, descriptor=descriptor, lease=""), **changes)


def fetching(
    stores: Stores,
    work: Callable[[Fetcher], Any],
    access: Access | None = None,
    fetches: int | None = None,
) -> Any:
    access = access or Access(patience=QUICK)

    async def run() -> Any:
        async with open_client(access) as client:
            fetcher = Fetcher(client, stores.content, stores.root.trash, Lanes(fetches))
            return await work(fetcher)

    return trio.run(run)


def fetch(stores: Stores, what: Sought, access: Access | None = None) -> Blob:
    lease = stores.leases.create().id
    blob = fetching(stores, lambda fetcher: fetcher.fetch(replace(what, lease=lease)), access)
    assert isinstance(blob, Blob)
    return blob


def stored(stores: Stores, what: Sought) -> bytes:
    return b"".join(stores.content.read_verified(what.descriptor.key))


@pytest.mark.parametrize("data", [b"", SMALL, DATA], ids=["empty", "small", "large"])
def test_a_blob_comes_in_once(data: bytes, stores: Stores, registry: FakeRegistry) -> None:
    what = sought(registry, data, labels={"a": "b"})
    blob = fetch(stores, what)
    origin = {f"containerd.io/distribution.source.{registry.name}": "a"}
    labels = {"a": "b", **origin}
    assert (blob.digest, blob.size, blob.labels) == (what.descriptor.digest, len(data), labels)
    assert stored(stores, what) == data
    asked = len(registry.asked)
    assert fetch(stores, replace(what, labels={"c": "d"})).labels == {**labels, "c": "d"}
    assert len(registry.asked) == asked
    assert not stores.content.statuses()


def test_who_follows_hears_how_far_it_is(stores: Stores, registry: FakeRegistry) -> None:
    data = random.Random("more").randbytes(BATCH + EXTENT)
    steps: list[tuple[str, int]] = []

    class Followed(Arrival):
        def tell(self, number: int, there: int) -> None:
            steps.append(("arrival", there))
            super().tell(number, there)

    arrival = Followed()

    def report(step: Step, _item: str, total: int, done: int, /) -> None:
        assert total == len(data)
        if step is Step.FETCH:
            steps.append(("report", done))

    blob = fetch(stores, sought(registry, data, arrival=arrival, report=report))
    assert arrival.blob == blob
    told = [there for kind, there in steps if kind == "arrival"]
    assert told == sorted(told)
    assert {0, EXTENT, len(data)} <= {*told}  # what comes first is not waited with
    assert len(registry.asked) == 1


BREAKS: Sequence[tuple[str, Fault]] = [
    ("cut before a byte", cut()),
    ("cut after the header", cut(0)),
    ("cut after a byte", cut(1)),
    ("cut in the middle", cut(EXTENT + 10)),
    ("cut before the last byte", cut(-1)),
    ("reset in the middle", reset(EXTENT + 10)),
    ("reset before the last byte", reset(-1)),
    ("silent in the middle", stall(EXTENT + 10)),
    ("silent before the last byte", stall(-1)),
    ("503", respond(response(503))),
    ("429", respond(response(429, headers={"Retry-After": "0"}))),
]


@pytest.mark.parametrize(("what", "fault"), BREAKS, ids=[row[0] for row in BREAKS])
def test_what_breaks_off_goes_on(
    what: str, fault: Fault, stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", fault, times=2)
    patience = replace(HURRIED, progress=0.3) if "silent" in what else QUICK
    fetch(stores, wanted, Access(patience=patience))
    assert stored(stores, wanted) == DATA
    starts = [int(one.headers.get("range", "bytes=0-")[6:-1]) for one in registry.asked]
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_what_breaks_off_for_good_is_gone_on_with_by_the_next(
    stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", cut(2 * EXTENT + 5))
    registry.plan("blobs", cut(), times=100)
    with pytest.raises(Unavailable, match=registry.name):
        fetch(stores, wanted)
    (status,) = stores.content.statuses()
    assert (status.offset, status.total) == (2 * EXTENT + 5, len(DATA))
    registry._planned.clear()
    registry.asked.clear()
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    assert [one.headers["range"] for one in registry.asked] == [f"bytes={2 * EXTENT + 5}-"]


def test_a_host_that_drips_a_byte_each_time_gets_there(stores: Stores, registry: FakeRegistry) -> None:
    wanted = sought(registry, SMALL)
    registry.plan("blobs", cut(1), times=100)
    fetch(stores, wanted)
    assert len(registry.asked) == len(SMALL)


def test_cri_17_a_host_that_does_not_get_on_is_given_up(stores: Stores, registry: FakeRegistry) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", cut(0), times=1000)
    with pytest.raises(Unavailable, match="broke off"):
        fetch(stores, wanted)
    assert len(registry.asked) == limits.ATTEMPTS


def other(data: bytes) -> Fault:
    """Answer other bytes, as many as are asked for."""

    def fault(connection: Any, asked: Asked, good: bytes) -> bool:
        head, gap, body = good.partition(b"\r\n\r\n")
        connection.sendall(head + gap + bytes([body[0] ^ 1]) + body[1:])
        return True

    return fault


WRONG: Sequence[tuple[str, Fault, type[EngineError]]] = [
    ("a wrong bit", other(DATA), DigestMismatch),
    ("zeros", respond(response(200, bytes(len(DATA)))), DigestMismatch),
    ("too short", respond(response(200, DATA[:-1])), Refused),
    ("too long", respond(response(200, DATA + b"x")), Refused),
    ("too long without a length",
     respond(response(200, DATA + b"x", {"Connection": "close"}), close=True), Refused),
    ("a login page", respond(response(200, b"<html>", {"Content-Type": "text/html"})), Refused),
    ("nothing", respond(response(200)), Refused),
    ("404", respond(response(404)), NotFound),
]  # fmt: skip


@pytest.mark.parametrize(("what", "fault", "kind"), WRONG, ids=[row[0] for row in WRONG])
def test_m04_m05_what_is_wrong_is_dropped_and_not_asked_for_again(
    what: str, fault: Fault, kind: type[EngineError], stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", fault, times=100)
    with pytest.raises(kind):
        fetch(stores, wanted)
    assert len(registry.asked) == 1
    assert all(status.offset == 0 for status in stores.content.statuses())
    with pytest.raises(NotFound):
        stores.content.info(wanted.descriptor.key)
    registry._planned.clear()
    fetch(stores, wanted)


@pytest.mark.parametrize(("what", "fault"), [row[:2] for row in WRONG], ids=[row[0] for row in WRONG])
def test_m05_another_host_is_asked_for_it(
    what: str, fault: Fault, stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    with FakeRegistry(content=registry.content).running() as mirror:
        mirror.plan("", fault, times=100)
        hosts = [default_host(mirror.name), default_host(registry.name)]
        fetch(stores, wanted, Access(patience=QUICK, hosts=lambda _domain: hosts))
        assert stored(stores, wanted) == DATA
        assert (len(mirror.asked), len(registry.asked)) == (1, 1)


def test_m05_what_came_from_two_hosts_is_asked_for_once_more(
    stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    with FakeRegistry(content=registry.content).running() as mirror:
        mirror.plan("", lambda c, a, good: cut(EXTENT)(c, a, good.replace(DATA[:9], b"x" * 9)))
        mirror.plan("", respond(response(404)), times=100)
        hosts = [default_host(mirror.name), default_host(registry.name)]
        fetch(stores, wanted, Access(patience=QUICK, hosts=lambda _domain: hosts))
    assert stored(stores, wanted) == DATA
    assert [one.headers.get("range") for one in registry.asked] == [f"bytes={EXTENT}-", None]


def test_what_came_before_stays_where_a_host_answers_nonsense(
    stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", cut(2 * EXTENT))
    registry.plan("blobs", respond(response(200, b"<html>")), times=100)
    with pytest.raises(Refused, match=registry.name):
        fetch(stores, wanted)
    (status,) = stores.content.statuses()
    assert status.offset == 2 * EXTENT


def test_a_blob_that_was_begun_wrongly_is_begun_anew(stores: Stores, registry: FakeRegistry) -> None:
    wanted = sought(registry, DATA)
    lease = stores.leases.create().id
    writer = stores.content.ingest(
        f"import-{wanted.descriptor.digest}",
        lease=lease,
        expected=wanted.descriptor.key,
        total=len(DATA),
    )
    with writer:
        writer.write(bytes(EXTENT))
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    assert [one.headers.get("range") for one in registry.asked] == [f"bytes={EXTENT}-", None]


def test_m19_many_who_want_one_blob_have_it_fetched_once(stores: Stores, registry: FakeRegistry) -> None:
    wanted = replace(sought(registry, DATA), lease=stores.leases.create().id)

    async def work(fetcher: Fetcher) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fetcher.fetch, wanted)

    fetching(stores, work)
    assert len(registry.asked) == 1


def test_one_who_leaves_keeps_what_came(stores: Stores, registry: FakeRegistry) -> None:
    wanted = replace(sought(registry, DATA), lease=stores.leases.create().id)
    registry.plan("blobs", stall(2 * EXTENT + 5))

    async def work(fetcher: Fetcher) -> None:
        arrival = Arrival()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.fetch, replace(wanted, arrival=arrival))
            await arrival.beyond(2 * EXTENT - 1)
            nursery.cancel_scope.cancel()

    with_due(lambda: fetching(stores, work))
    (status,) = stores.content.statuses()
    assert status.offset >= 2 * EXTENT
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA


def with_due(work: Callable[[], object]) -> None:
    """Have what came handed over at once, as of a slow host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.registry.fetching._HAND_OVER_S", 0)
        work()


def test_what_cannot_be_written(stores: Stores, registry: FakeRegistry) -> None:
    wanted = sought(registry, DATA)
    with armed("content.ingest.written", "error"), pytest.raises(EngineError, match="failpoint"):
        fetch(stores, wanted)
    huge = Descriptor(media_type=LAYER, digest=wanted.descriptor.digest, size=1 << 62)
    registry.asked.clear()
    with pytest.raises(ResourceExhausted, match="no space left"):
        fetch(stores, replace(wanted, descriptor=huge))
    assert not registry.asked


def test_m13_a_layer_that_its_owner_keeps(stores: Stores, registry: FakeRegistry) -> None:
    kind = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    descriptor = Descriptor(media_type=kind, digest=digest_of(b"elsewhere"), size=9)
    with pytest.raises(NotFound, match="follows no such URLs"):
        fetch(stores, replace(sought(registry, b""), descriptor=descriptor))


def held_up(together: int) -> tuple[Fault, list[int]]:
    """Answer once so many are asked for at once; note how many were on their way at each answer."""
    meeting = Barrier(together)
    on_their_way: set[int] = set()
    most: list[int] = []

    def fault(connection: Any, _asked: Asked, good: bytes) -> bool:
        on_their_way.add(get_ident())
        meeting.wait(10)
        most.append(len(on_their_way))
        meeting.wait(10)
        on_their_way.remove(get_ident())
        meeting.wait(10)
        connection.sendall(good)
        return True

    return fault, most


@pytest.mark.parametrize(
    ("bound", "engine", "host", "image", "together"),
    [("engine", 2, 9, 9, 2), ("host", 9, 2, 9, 2), ("image", 9, 9, 2, 4)],
)
def test_ms26_up18_up19_bodies_at_once_are_bounded(  # noqa: PLR0917  a row, and fixtures
    bound: str,
    engine: int,
    host: int,
    image: int,
    together: int,
    stores: Stores,
    registry: FakeRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "FETCHES_OF_HOST", host)
    monkeypatch.setattr(limits, "FETCHES_OF_IMAGE", image)
    lease = stores.leases.create().id
    wanted = [sought(registry, bytes([n]) * 99, lease=lease) for n in range(8)]
    fault, most = held_up(together)
    registry.plan("blobs", fault, times=8)

    async def work(first: Fetcher) -> None:
        second = Fetcher(first._client, stores.content, stores.root.trash, first._lanes._lanes)
        async with trio.open_nursery() as nursery:
            for fetcher, half in ((first, wanted[:4]), (second, wanted[4:])):
                for one in half:
                    nursery.start_soon(fetcher.fetch, one)

    fetching(stores, work, fetches=engine)
    assert most == [together] * 8


def test_up19_who_waits_is_in_nobodys_way(stores: Stores, registry: FakeRegistry) -> None:
    lease = stores.leases.create().id
    slow, quick = (sought(registry, data, lease=lease) for data in (b"slow", b"quick"))
    was_asked = Event()

    def busy(connection: Any, _asked: Asked, _good: bytes) -> bool:
        was_asked.set()
        connection.sendall(response(429))
        return True

    registry.plan(slow.descriptor.digest, busy, times=1000)
    patience = replace(QUICK, attempts=1000)

    async def work(fetcher: Fetcher) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.fetch, slow)
            await trio.to_thread.run_sync(was_asked.wait)
            await fetcher.fetch(quick)  # though the only lane there is was another's
            nursery.cancel_scope.cancel()

    fetching(stores, work, Access(patience=patience), fetches=1)


def test_a_host_that_does_not_take_the_range_is_asked_again_in_the_same_lane(
    stores: Stores, registry: FakeRegistry
) -> None:
    wanted = sought(registry, DATA)
    registry.plan("blobs", cut(EXTENT))
    registry.plan("blobs", respond(response(416)))
    lease = stores.leases.create().id
    fetching(stores, lambda fetcher: fetcher.fetch(replace(wanted, lease=lease)), fetches=1)
    assert stored(stores, wanted) == DATA


@pytest.mark.parametrize("words", [{"fetches": 0}, {"bandwidth": 0}, {"bandwidth": -1}])
def test_bounds_that_let_nothing_through(words: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        Lanes(**words)


def test_bytes_a_second_are_bounded() -> None:
    async def run() -> float:
        bandwidth = Bandwidth(1000)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(bandwidth.take, 500)
        return trio.current_time()

    clock = MockClock(autojump_threshold=0)
    began = clock.current_time()
    assert 4.8 <= trio.run(run, clock=clock) - began <= 5.0
