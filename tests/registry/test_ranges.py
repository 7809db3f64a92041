"""Large blobs in several ranges at once: in order, bounded, in one stream where a host will not."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from threading import Barrier, Semaphore
from typing import Any

import pytest
import trio
import trio.testing

from engine import limits
from engine.errors import DigestMismatch, Unavailable
from engine.registry.client import Access, open_client
from engine.registry.fetching import Fetcher, Sought
from engine.registry.lanes import ImageLanes, Lanes
from engine.registry.ranges import _Part
from engine.registry.retrying import Patience
from engine.stores import Stores
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, cut, reset, respond, response, stall
from tests.registry.asking import HURRIED, QUICK
from tests.registry.test_fetching import sought, stored

RANGE = 64 * 1024
DATA = random.Random("ranges").randbytes(16 * RANGE - 100)
LANES = 4


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    monkeypatch.setattr(limits, "RANGE", RANGE)
    monkeypatch.setattr(limits, "RANGES_FROM", 2 * RANGE)
    monkeypatch.setattr(limits, "RANGE_ALONE", 5 * RANGE)
    monkeypatch.setattr(limits, "RANGE_RATE", 1 << 60)
    monkeypatch.setattr(limits, "FETCHES_OF_IMAGE", LANES)
    with FakeRegistry().running() as running:
        yield running


@pytest.fixture
def wanted(registry: FakeRegistry, stores: Stores) -> Sought:
    return sought(registry, DATA, lease=stores.leases.create().id)


def fetch(
    stores: Stores, wanted: Sought, fetches: int | None = None, patience: Patience = QUICK
) -> None:
    """Fetch a blob; all lanes are free again then."""

    async def run() -> None:
        async with open_client(Access(patience=patience)) as client:
            fetcher = Fetcher(client, stores.content, stores.root.trash, Lanes(fetches))
            await fetcher.fetch(wanted)
            assert fetcher._lanes._own.borrowed_tokens == 0

    trio.run(run)


def spans(registry: FakeRegistry) -> list[tuple[int, int]]:
    """Return where each range that was asked for begins and ends."""
    found = []
    for one in registry.asked:
        start, _, end = one.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        found.append((int(start), int(end) + 1 if end else len(DATA)))
    return found


def bytes_asked(registry: FakeRegistry) -> int:
    return sum(end - start for start, end in spans(registry))


def test_ranges_come_beside_each_other(
    stores: Stores, registry: FakeRegistry, wanted: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three at a time: as a connection gives so many bytes a second, in a third of the time.
    monkeypatch.setattr(limits, "FETCHES_OF_IMAGE", 3)
    meeting = Barrier(3)

    def together(connection: Any, _asked: Asked, good: bytes) -> bool:
        connection.sendall(good[:-1])
        meeting.wait(10)
        connection.sendall(good[-1:])
        return True

    registry.plan("blobs", of_others(together), times=16)
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    edges = [n * RANGE for n in range(16)]
    assert sorted(spans(registry)) == [*pairwise([*edges, len(DATA)])]


def test_a_small_blob_is_asked_for_at_once(stores: Stores, registry: FakeRegistry) -> None:
    small = sought(registry, DATA[: 2 * RANGE], lease=stores.leases.create().id)
    fetch(stores, small)
    assert [one.headers.get("range") for one in registry.asked] == [None]


def test_a_host_that_is_quick_is_asked_for_long_ranges(
    stores: Stores, registry: FakeRegistry, wanted: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RANGE_RATE", 1 / 1000)
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    edges = [0, RANGE, 6 * RANGE, 11 * RANGE, len(DATA)]
    assert spans(registry) == [*pairwise(edges)]


def test_what_comes_alone_comes_in_long_ranges(
    stores: Stores, registry: FakeRegistry, wanted: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FETCHES_OF_IMAGE", 1)
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    edges = [0, RANGE, 6 * RANGE, 11 * RANGE, len(DATA)]
    assert spans(registry) == [*pairwise(edges)]


def test_up19_no_more_is_asked_for_than_there_are_lanes(
    stores: Stores, registry: FakeRegistry, wanted: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What comes next is held back: the rest waits in memory, and that is bounded.
    begin = f"bytes={RANGE}-{2 * RANGE - 1}"
    ended = Semaphore(0)
    end_with = _Part.end_with
    monkeypatch.setattr(_Part, "end_with", lambda *words: (end_with(*words), ended.release()))
    counted = []

    def held(connection: Any, asked: Asked, good: bytes) -> bool:
        connection.sendall(good[:-1])
        if asked.headers["range"] == begin:
            assert all(ended.acquire(timeout=10) for _ in range(LANES - 1))
            counted.append(len(registry.asked))
        connection.sendall(good[-1:])
        return True

    registry.plan("blobs", held, times=99)
    fetch(stores, wanted)
    assert counted == [1 + LANES]
    assert stored(stores, wanted) == DATA


def test_up19_no_lane_is_to_spare_that_somebody_waits_for() -> None:
    async def run() -> None:
        lanes = Lanes(1)
        first, second = lanes.of_image(), lanes.of_image()
        had = first.spare("x")
        assert had
        assert second.spare("x") is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(holding, second)
            await trio.testing.wait_all_tasks_blocked()
            had.close()
            assert first.spare("x") is None
            nursery.cancel_scope.cancel()
        assert first.spare("x")

    async def holding(lanes: ImageLanes) -> None:
        async with lanes.lane("x"):
            await trio.sleep_forever()

    trio.run(run)


REST = r"bytes=[1-9]\d*-\d"


def of_others(fault: Fault) -> Fault:
    """Do something to ranges but the first, and leave alone a stream to the end."""

    def chosen(connection: Any, asked: Asked, good: bytes) -> bool:
        if re.match(REST, asked.headers.get("range", "")):
            return fault(connection, asked, good)
        connection.sendall(good)
        return True

    return chosen


def replaced(pattern: bytes, by: bytes) -> Fault:
    def fault(connection: Any, _asked: Asked, good: bytes) -> bool:
        head, gap, body = good.partition(b"\r\n\r\n")
        connection.sendall(re.sub(pattern, by, head) + gap + body)
        return False

    return fault


WHOLE = response(200, DATA)
UNTO_THE_END = response(
    206, DATA[RANGE:], {"Content-Range": f"bytes {RANGE}-{len(DATA) - 1}/{len(DATA)}"}
)
REFUSED: Sequence[tuple[str, Fault]] = [
    ("200", respond(WHOLE, close=True)),
    ("to the end", respond(UNTO_THE_END, close=True)),
    ("from elsewhere", replaced(rb"bytes \d+-", b"bytes 1-")),
    ("of another size", replaced(rb"/\d+", b"/17")),
    ("without saying which", replaced(rb"Content-Range", b"X-Range")),
    ("of another length", replaced(rb"Content-Length: \d+", b"Content-Length: 5")),
    *[(str(status), respond(response(status))) for status in (401, 403, 404, 416, 418, 429, 500, 503)],
    ("429 for a minute", respond(response(429, headers={"Retry-After": "60"}))),
    ("closed", cut()),
    ("reset", reset()),
    ("cut after the header", cut(0)),
    ("cut after a byte", cut(1)),
    ("reset before the last byte", reset(-1)),
    ("silent", stall()),
    ("silent in the middle", stall(100)),
]


@pytest.mark.parametrize("times", [1, 999])
@pytest.mark.parametrize(("what", "fault"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_host_that_sends_no_ranges_is_asked_for_all(
    times: int, what: str, fault: Fault, stores: Stores, registry: FakeRegistry, wanted: Sought
) -> None:
    registry.plan("blobs", of_once(fault, times), times=999)
    patience = HURRIED if "silent" in what else QUICK
    fetch(stores, wanted, patience=patience)
    assert stored(stores, wanted) == DATA
    # Some that were on their way, twice at most; then the rest once.
    assert len(registry.asked) <= 16 + 2 * LANES
    assert bytes_asked(registry) <= len(DATA) + 2 * LANES * RANGE


def of_once(fault: Fault, times: int) -> Fault:
    left = [times]

    def counted(connection: Any, asked: Asked, good: bytes) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            return fault(connection, asked, good)
        connection.sendall(good)
        return True

    return of_others(counted)


FIRST: Sequence[tuple[str, Fault]] = [
    ("200", respond(response(200, DATA))),
    ("to the end",
     respond(response(206, DATA, {"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "fault"), FIRST, ids=[row[0] for row in FIRST])
def test_a_host_that_knows_no_ranges_is_asked_once(
    what: str, fault: Fault, stores: Stores, registry: FakeRegistry, wanted: Sought
) -> None:
    registry.plan("blobs", fault, times=99)
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    assert len(registry.asked) == 1


def test_a_host_that_sends_less_than_was_asked_for(
    stores: Stores, registry: FakeRegistry, wanted: Sought
) -> None:
    headers = {"Content-Range": f"bytes 0-99/{len(DATA)}"}
    registry.plan("blobs", respond(response(206, DATA[:100], headers)))
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    assert [one.headers.get("range") for one in registry.asked][1:] == ["bytes=100-"]


def test_m05_wrong_bytes_in_a_range_are_not_asked_for_again(
    stores: Stores, registry: FakeRegistry, wanted: Sought
) -> None:
    def flipped(connection: Any, _asked: Asked, good: bytes) -> bool:
        connection.sendall(good[:-1] + bytes([good[-1] ^ 1]))
        return True

    registry.plan("blobs", of_once(flipped, 1), times=99)
    with pytest.raises(DigestMismatch):
        fetch(stores, wanted)
    assert bytes_asked(registry) == len(DATA)
    assert all(status.offset == 0 for status in stores.content.statuses())


def test_what_came_in_ranges_is_gone_on_with(
    stores: Stores, registry: FakeRegistry, wanted: Sought, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = f"bytes={5 * RANGE}-"

    def fault(connection: Any, asked: Asked, good: bytes) -> bool:
        if int(asked.headers["range"][6:].partition("-")[0]) >= 5 * RANGE:
            return False
        connection.sendall(good)
        return True

    registry.plan("blobs", fault, times=999)
    with pytest.raises(Unavailable):
        fetch(stores, wanted)
    (status,) = stores.content.statuses()
    assert status.offset == 5 * RANGE
    assert any(one.headers["range"] == broken for one in registry.asked)  # as one stream, at last
    registry._planned.clear()
    registry.asked.clear()
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA
    assert min(spans(registry))[0] == 5 * RANGE
    assert bytes_asked(registry) == len(DATA) - 5 * RANGE


def test_cancelling_while_ranges_come(stores: Stores, registry: FakeRegistry, wanted: Sought) -> None:
    there = Barrier(LANES + 1)

    def silent(connection: Any, asked: Asked, good: bytes) -> bool:
        connection.sendall(good[:-1])
        there.wait(10)
        return stall()(connection, asked, good)

    registry.plan("blobs", of_others(silent), times=99)

    async def run() -> None:
        async with open_client(Access(patience=QUICK)) as client:
            fetcher = Fetcher(client, stores.content, stores.root.trash, Lanes())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetcher.fetch, wanted)
                await trio.to_thread.run_sync(there.wait)
                nursery.cancel_scope.cancel()
            assert fetcher._lanes._own.borrowed_tokens == 0

    trio.run(run)
    registry._planned.clear()
    fetch(stores, wanted)
    assert stored(stores, wanted) == DATA


def test_ranges_are_bounded_by_the_engine_too(
    stores: Stores, registry: FakeRegistry, wanted: Sought
) -> None:
    here: set[Any] = set()
    most = []

    def noted(connection: Any, _asked: Asked, good: bytes) -> bool:
        here.add(connection)
        most.append(len(here))
        connection.sendall(good)
        here.discard(connection)
        return True

    registry.plan("blobs", noted, times=99)

    fetch(stores, wanted, fetches=2)
    assert max(most) <= 2
    assert bytes_asked(registry) == len(DATA)
