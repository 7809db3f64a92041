"""When an engine collects: containerd's scheduler tests by name, and what expiry adds."""

import pytest
import trio
import trio.testing

from engine.errors import EngineError, InvalidArgument, Unavailable
from engine.gc.activity import Seen
from engine.gc.collect import Collected
from engine.gc.scheduler import Schedule, Scheduler, scheduling

S = 10**9
NOTHING = Collected(blobs=[], snapshots=[], ingests=[], leases=[], blob_bytes=0, snapshot_bytes=0)


class Store:
    """A store whose collections take time on trio's clock, and what a look at it shows."""

    def __init__(self, takes=0.0):
        self.takes = takes
        self.runs: list[float] = []
        self.looks = 0
        self.transactions = self.deletions = 0
        self.expiries: list[int] = []
        self.collected = NOTHING
        self.failure: Exception | None = None
        self.is_pressed = False
        self.jumped = 0
        self.ended = 0

    def wall(self):
        return int(trio.current_time() * S) + 10**18 + self.jumped

    async def collect(self):
        self.runs.append(trio.current_time())
        self.transactions += 3  # its own
        await trio.sleep(self.takes)
        self.ended += 1
        if self.failure:
            raise self.failure
        self.expiries = [one for one in self.expiries if one > self.wall()]
        return self.collected

    async def look(self, since, _before):
        self.looks += 1
        await trio.lowlevel.checkpoint()
        return Seen(
            at=self.wall(),
            transactions=self.transactions,
            deletions=self.deletions,
            expires=min((one for one in self.expiries if one > since), default=None),
            is_pressed=self.is_pressed,
        )

    def scheduler(self, **values):
        return Scheduler(Schedule(**values), self.collect, self.look)


def simulated(test):
    """Run an async test on a clock that only goes on when all wait."""

    def run():
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@simulated
async def test_pause_threshold():
    """Collections take no more than their share of the time, however much there is to do."""
    store = Store(takes=0.1)
    async with scheduling(store.scheduler(pause_threshold=0.02)):
        for _ in range(200):
            store.deletions += 1
            await trio.sleep(0.5)
    gaps = [later - earlier for earlier, later in zip(store.runs, store.runs[1:], strict=False)]
    assert len(store.runs) == 20
    assert all(gap == pytest.approx(5.0) for gap in gaps)  # 0.1 of collecting, 4.9 of pause


@simulated
async def test_pause_threshold_of_quick_collections():
    store = Store(takes=0.0)
    async with scheduling(store.scheduler()):
        await trio.sleep(0.11)
        store.deletions += 1
        await trio.sleep(1)
    assert store.runs == [pytest.approx(0.1), pytest.approx(0.345)]  # 5 ms count at least


@simulated
async def test_deletion_threshold():
    """So many deletions do not wait for the end of the pause."""
    store = Store(takes=1.0)
    async with scheduling(store.scheduler(pause_threshold=0.001, deletion_threshold=5)):
        await trio.sleep(2)
        assert len(store.runs) == 1
        store.deletions += 4
        await trio.sleep(100)
        assert len(store.runs) == 1
        store.deletions += 1
        await trio.sleep(0.3)
        assert len(store.runs) == 2


@simulated
async def test_trigger():
    """Whoever asks gets one that begins then; who asks at one time shares it."""
    store = Store(takes=0.01)
    store.collected = Collected(
        blobs=["x"], snapshots=[], ingests=[], leases=[], blob_bytes=1, snapshot_bytes=0
    )
    scheduler = store.scheduler(startup_delay=0)
    results = []

    async def ask():
        results.append(await scheduler.collect())

    async with scheduling(scheduler):
        await ask()
        assert (results, len(store.runs)) == ([store.collected], 1)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            await trio.sleep(0.005)
            assert len(store.runs) == 2
            nursery.start_soon(ask)  # the one under way may have passed by what this one did
    assert (len(results), len(store.runs)) == (5, 3)


@simulated
async def test_a_delay_lets_more_come_together():
    store = Store()
    scheduler = store.scheduler(startup_delay=0, schedule_delay=2)
    async with scheduling(scheduler), trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(scheduler.collect)
            await trio.sleep(0.6)
    assert store.runs == [pytest.approx(2.0), pytest.approx(3.8, abs=0.3)][: len(store.runs)]
    assert len(store.runs) == 1


@simulated
async def test_startup_delay():
    """The first one needs no reason."""
    store = Store()
    async with scheduling(store.scheduler(startup_delay=7)):
        await trio.sleep(6.9)
        assert not store.runs
        await trio.sleep(0.2)
        assert store.runs == [pytest.approx(7)]
        await trio.sleep(300)
        assert len(store.runs) == 1


@simulated
async def test_mutation_threshold():
    store = Store()
    async with scheduling(store.scheduler()):
        await trio.sleep(1)
        store.transactions += 99
        await trio.sleep(60)
        assert len(store.runs) == 1
        store.transactions += 1
        await trio.sleep(0.3)
        assert len(store.runs) == 2


@simulated
async def test_without_a_share_of_time_reasons_alone_decide():
    store = Store(takes=1)
    async with scheduling(store.scheduler(pause_threshold=0, startup_delay=0, mutation_threshold=10)):
        await trio.sleep(100)
        assert not store.runs
        store.deletions += 1
        await trio.sleep(1.5)
        assert len(store.runs) == 1
        await trio.sleep(100)
        store.transactions += 10
        await trio.sleep(1.5)
        assert len(store.runs) == 2
        await trio.sleep(100)
        assert len(store.runs) == 2


@simulated
async def test_a_failure_is_tried_again_later_and_told_to_who_waits():
    store = Store()
    store.failure = EngineError("no")
    scheduler = store.scheduler()
    async with scheduling(scheduler):
        await trio.sleep(0.05)
        with pytest.raises(EngineError, match="no"):
            await scheduler.collect()
        await trio.sleep(3.5)
        store.failure = None
        assert store.runs == [pytest.approx(at) for at in (0.05, 1.05, 3.05)]
        await trio.sleep(60)
        assert len(store.runs) == 4


@simulated
async def test_a_look_that_fails_ends_nothing_not_even_the_first():
    store = Store()
    scheduler = store.scheduler()
    look, failing = scheduler._do_look, [Unavailable("busy"), EngineError("EIO")]

    async def fails(since, before):
        if failing:
            raise failing.pop()
        return await look(since, before)

    scheduler._do_look = fails
    async with scheduling(scheduler):
        await trio.sleep(0.2)
        assert (store.runs, failing) == ([pytest.approx(0.1)], [])
        store.deletions += 1
        await trio.sleep(1)
        assert len(store.runs) == 2


@simulated
async def test_what_expires_is_collected_on_time():
    """containerd #6294: nothing else happens, and it goes."""
    store = Store()
    async with scheduling(store.scheduler()):
        await trio.sleep(1)
        store.expiries = [store.wall() + 100 * S, store.wall() + 200 * S]  # by another process
        store.transactions += 2
        await trio.sleep(99)
        assert len(store.runs) == 1
        await trio.sleep(1.1)
        assert len(store.runs) == 2
        await trio.sleep(98)
        assert len(store.runs) == 2
        await trio.sleep(3)
        assert len(store.runs) == 3
        await trio.sleep(1000)
        assert len(store.runs) == 3


@simulated
async def test_what_the_last_collection_says_expires_is_collected_on_time():
    store = Store()
    store.collected = Collected(
        blobs=[],
        snapshots=[],
        ingests=[],
        leases=[],
        blob_bytes=0,
        snapshot_bytes=0,
        expires=store_time(50),
    )
    async with scheduling(store.scheduler(pause_threshold=0)):
        await trio.sleep(49)
        store.collected = NOTHING
        assert len(store.runs) == 1
        await trio.sleep(1.1)
        assert len(store.runs) == 2
        await trio.sleep(1000)
        assert len(store.runs) == 2


def store_time(seconds):
    return 10**18 + seconds * S


@simulated
async def test_what_stays_though_it_expired_is_no_reason_for_ever():
    store = Store()
    async with scheduling(store.scheduler()):
        await trio.sleep(1)
        soon = store.wall() + S
        store.expiries = [soon]
        await trio.sleep(2)
        store.expiries = [soon]
        store.transactions += 1
        await trio.sleep(1000)
    assert len(store.runs) == 2


@simulated
async def test_a_clock_that_is_set_back_is_noted_by_a_collection():
    store = Store()
    async with scheduling(store.scheduler()):
        await trio.sleep(10)
        store.jumped = -3600 * S
        await trio.sleep(1)
        assert len(store.runs) == 2


@simulated
async def test_a_policy_that_cannot_help_is_not_tried_all_the_time():
    store = Store()
    store.is_pressed = True
    async with scheduling(store.scheduler()):
        await trio.sleep(850)
    assert len(store.runs) == 3


@simulated
async def test_who_gives_up_waiting_harms_nobody():
    store = Store(takes=5)
    scheduler = store.scheduler(startup_delay=0)
    async with scheduling(scheduler):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scheduler.collect)
            with trio.move_on_after(1):
                await scheduler.collect()
        assert store.ended == 1


@simulated
async def test_gc_24_closing_ends_a_collection_and_tells_who_waits():
    store = Store(takes=1000)
    scheduler = store.scheduler(startup_delay=0)
    errors = []

    async def ask():
        with pytest.raises(Unavailable, match="closed") as caught:
            await scheduler.collect()
        errors.append(caught.value)

    async with trio.open_nursery() as nursery, scheduling(scheduler):
        nursery.start_soon(ask)
        await trio.sleep(1)
        nursery.start_soon(ask)
        await trio.sleep(1)
    assert (len(errors), store.ended, trio.current_time()) == (2, 0, pytest.approx(2))


@simulated
async def test_an_error_of_the_block_comes_out_as_it_is():
    with pytest.raises(KeyError):
        async with scheduling(Store().scheduler()):
            raise KeyError


@simulated
async def test_a_look_that_fails_is_repeated():
    store = Store()
    look, fails = store.look, []

    async def failing(since, before):
        if fails:
            fails.pop()
            raise EngineError("no")
        return await look(since, before)

    scheduler = Scheduler(Schedule(), store.collect, failing)
    async with scheduling(scheduler):
        await trio.sleep(1)
        store.deletions += 1
        fails += [1, 1]
        await trio.sleep(1)
        assert (fails, len(store.runs)) == ([], 2)


@pytest.mark.parametrize(
    "values", [{"pause_threshold": 0.6}, {"pause_threshold": -1}, {"schedule_delay": -1.0}]
)
def test_schedules_that_make_no_sense(values):
    with pytest.raises(InvalidArgument):
        Schedule(**values)
