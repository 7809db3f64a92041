"""How far work is, by what it reports: sums, order, rates, and what who joins late sees."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.observing.tally import Tally
from engine.progress import Amount, Headway, Stage, Step, Task

ITEMS = ("sha256:a", "sha256:b", "sha256:c")
SIZES = dict(zip(ITEMS, (100, 7, 50), strict=True))
OF_PARTS = [
    *(Step.FETCH, Step.FOUND, Step.KEEP, Step.PLACE, Step.OTHER),
    *(Step.UNPACK, Step.BELOW, Step.FLUSH, Step.SHARE, Step.DONE),
]

Told = tuple[Step, str, int, int]


@st.composite
def reports(draw: st.DrawFn) -> Told:
    item = draw(st.sampled_from([*ITEMS, "another process"]))
    if item not in SIZES:
        return Step.WAIT, item, 1, draw(st.integers(0, 1))
    done = draw(st.integers(0, SIZES[item]))
    step = draw(st.sampled_from(OF_PARTS))
    if step is Step.FETCH and item == ITEMS[2]:  # a blob comes in one of two ways
        step = Step.STORE
    return step, item, SIZES[item], SIZES[item] if step in {Step.KEEP, Step.DONE} else done


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(said: Sequence[Told]) -> Tally:
    tally = Tally(Clock())
    for one in said:
        tally(*one)
    return tally


def without_rates(headway: Headway) -> object:
    def bare(value: object) -> object:
        if isinstance(value, Amount):
            return msgspec.structs.replace(value, rate=0.0)
        if isinstance(value, msgspec.Struct):
            return tuple(map(bare, msgspec.structs.astuple(value)))
        return tuple(map(bare, value)) if isinstance(value, tuple) else value

    return bare(headway)


@given(st.lists(reports(), max_size=40))
def test_sums_are_those_of_the_parts(said: list[Told]) -> None:
    headway = told(said).headway()
    for way in ("fetch", "apply"):
        amounts = [amount for part in headway.parts if (amount := getattr(part, way))]
        for name in ("done", "total", "found"):
            whole = sum(getattr(amount, name) for amount in amounts)
            assert getattr(getattr(headway, way), name) == whole
    assert headway.done == sum(part.stage is Stage.DONE for part in headway.parts)


@given(st.lists(reports(), max_size=40))
def test_no_step_back(said: list[Told]) -> None:
    tally = Tally(Clock())
    seen: dict[tuple[str, str], int] = {}
    for step, item, total, amount in said:
        tally(step, item, total, amount)
        for part in tally.headway().parts:
            for way in ("fetch", "apply"):
                if found := getattr(part, way):
                    assert seen.get((part.digest, way), 0) <= found.done <= found.total
                    assert 0 <= found.found <= found.done
                    assert found.rate >= 0
                    seen[part.digest, way] = found.done


@given(st.lists(reports(), max_size=30), st.lists(reports(), max_size=10))
def test_who_joins_late_sees_what_the_others_see(before: list[Told], after: list[Told]) -> None:
    first, late = told(before), Tally(Clock())
    first.replay(late)
    assert without_rates(late.headway()) == without_rates(first.headway())
    for one in after:
        first(*one)
        late(*one)
    assert without_rates(late.headway()) == without_rates(first.headway())


def test_the_stages_of_a_layer_that_is_pulled() -> None:
    tally = Tally(Clock())
    seen: list[tuple[Stage, Step | None]] = []
    for step, done in (
        (Step.PLACE, 0),
        (Step.FETCH, 0),
        (Step.FETCH, 40),
        (Step.OTHER, 0),
        (Step.OTHER, 100),
        (Step.FETCH, 100),
        (Step.KEEP, 100),
        (Step.PLACE, 100),
        (Step.UNPACK, 0),
        (Step.UNPACK, 60),
        (Step.UNPACK, 100),
        (Step.BELOW, 0),
        (Step.BELOW, 100),
        (Step.FLUSH, 0),
        (Step.DONE, 100),
    ):
        tally(step, "sha256:a", 100, done)
        (part,) = tally.headway().parts
        if not seen or seen[-1] != (part.stage, part.waits_for):
            seen.append((part.stage, part.waits_for))
    assert seen == [
        (Stage.WAITING, Step.PLACE),
        (Stage.FETCHING, Step.PLACE),
        (Stage.FETCHING, Step.OTHER),
        (Stage.FETCHING, Step.PLACE),
        (Stage.VERIFYING, Step.PLACE),
        (Stage.WAITING, Step.PLACE),
        (Stage.WAITING, None),
        (Stage.APPLYING, None),
        (Stage.COMMITTING, None),
        (Stage.WAITING, Step.BELOW),
        (Stage.COMMITTING, None),
        (Stage.DONE, None),
    ]


def test_a_layer_that_is_there_is_done_when_its_blob_is_here_again() -> None:
    said = [(Step.PLACE, 0), (Step.FETCH, 0), (Step.DONE, 9), (Step.FETCH, 9)]
    tally = told([(step, "sha256:a", 9, done) for step, done in said])
    assert tally.headway().parts[0].stage is Stage.VERIFYING
    tally(Step.KEEP, "sha256:a", 9, 9)
    assert tally.headway().parts[0].stage is Stage.DONE


def test_what_is_only_stored_is_done_when_it_is_kept() -> None:
    tally = told([(Step.STORE, "sha256:a", 9, 9)])
    assert tally.headway().parts[0].stage is Stage.VERIFYING
    tally(Step.KEEP, "sha256:a", 9, 9)
    assert tally.headway().parts[0].stage is Stage.DONE


def test_what_is_done_by_others_was_not_gone_through() -> None:
    tally = told([(Step.PLACE, "sha256:a", 9, 0), (Step.DONE, "sha256:a", 9, 9)])
    (part,) = tally.headway().parts
    assert part.apply == Amount(9, 9, 0.0, 9)


def test_a_rate_is_that_of_the_last_seconds_and_of_what_moved() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally(Step.FETCH, "sha256:a", 1000, 0)
    clock.now = 60.0  # in a queue
    tally(Step.FOUND, "sha256:a", 1000, 400)
    tally(Step.FETCH, "sha256:a", 1000, 400)
    assert tally.headway().fetch.rate == 0.0
    assert tally.headway().remaining is None
    for second in range(1, 4):
        clock.now = 60.0 + second
        tally(Step.FETCH, "sha256:a", 1000, 400 + 10 * second)
    amount = tally.headway().fetch
    assert amount == tally.headway().parts[0].fetch
    assert amount.rate == pytest.approx(10.0)
    assert amount.remaining == pytest.approx(57.0)
    clock.now = 63.0 + 2.0  # nothing comes
    assert tally.headway().fetch.rate == pytest.approx(6.0)
    clock.now = 80.0
    assert tally.headway().fetch.rate == 0.0


def test_a_slow_rate_is_no_division_by_whole_numbers() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally(Step.FETCH, "sha256:a", 10, 0)
    clock.now = 4.0
    tally(Step.FETCH, "sha256:a", 10, 1)
    assert tally.headway().remaining == pytest.approx(36.0)


def test_memory_is_for_what_there_is_not_for_what_is_told() -> None:
    clock = Clock()
    tally = Tally(clock)
    for number in range(20_000):
        clock.now += 0.001
        tally(Step.FETCH, "sha256:a", 20_000, number)
    assert len(tally._told) == 1
    assert all(len(speed._seen) < 120 for speed in tally._speeds.values())


def test_other_work_and_waits() -> None:
    tally = told([(Step.READ, "x.tar", 0, 5), (Step.WAIT, "process 7", 1, 0), (Step.SWEEP, "x", 2, 2)])
    headway = tally.headway()
    assert headway.tasks == (Task(Step.READ, "x.tar", 0, 5),)
    assert headway.waits == ("process 7",)
    tally(Step.WAIT, "process 7", 1, 1)
    assert not tally.headway().waits
