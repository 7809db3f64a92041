"""Progress as text: it fits, says what moves first, and is right in one line."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from engine.cli.drawing import lines, summary
from engine.progress import Amount, Headway, Part, Stage, Step, Task

MB = 10**6


def part(number: int, stage: Stage, done: int = 0, **more: object) -> Part:
    apply = Amount(done * MB, 10 * MB, 1e6) if stage in {Stage.APPLYING, Stage.COMMITTING} else None
    fetch = Amount(10 * MB if apply or stage is Stage.DONE else done * MB, 10 * MB, 2e6)
    return Part(digest=f"sha256:{number:064x}", stage=stage, fetch=fetch, apply=apply, **more)  # type: ignore[arg-type]


def headway(parts: Sequence[Part], **more: object) -> Headway:
    fetched = [one.fetch for one in parts if one.fetch]
    done, total = sum(one.done for one in fetched), sum(one.total for one in fetched)
    return Headway(parts=tuple(parts), fetch=Amount(done, total, 4e6), **more)  # type: ignore[arg-type]


TEN = [
    *(part(number, Stage.DONE) for number in range(4)),
    part(4, Stage.APPLYING, 5),
    part(5, Stage.FETCHING, 3),
    part(6, Stage.WAITING, waits_for=Step.OTHER),
    *(part(number, Stage.WAITING) for number in range(7, 10)),
]


def test_a_line_for_each_layer_and_one_for_all() -> None:
    shown = list(lines(headway(TEN), 80, 24))
    assert len(shown) == 11
    assert all(line.startswith("000000000000") for line in shown[:10])
    assert re.search(r"applying +━+─+ 5\.0 MB of 10\.0 MB +1\.0 MB/s", shown[4])
    assert re.search(r"fetching +━+─+ 3\.0 MB of 10\.0 MB +2\.0 MB/s", shown[5])
    assert shown[6].endswith("waiting    for another process")
    assert shown[-1] == "4 of 10 layers done, 53.0 MB of 100.0 MB, 4.0 MB/s, about 12 s left"
    assert summary(headway(TEN)) == (
        "4 of 10 layers done: 4 waiting/1 fetching/1 applying, "
        "53.0 MB of 100.0 MB, 4.0 MB/s, about 12 s left"
    )


def test_forty_columns_have_what_matters() -> None:
    shown = list(lines(headway(TEN), 40, 24))
    assert all(cell_len(line) <= 39 for line in shown)
    assert re.search(r"applying +━+─+ +50%$", shown[4])
    assert shown[-1] == "4 of 10 layers done, about 12 s left"


def test_of_many_layers_those_that_move_are_shown() -> None:
    parts = [part(number, Stage.DONE) for number in range(80)]
    parts += [part(number, Stage.FETCHING, 1) for number in range(80, 84)]
    parts += [part(number, Stage.WAITING) for number in range(84, 120)]
    shown = list(lines(headway(parts), 80, 24))
    assert len(shown) <= 23
    assert sum("fetching" in line for line in shown[:-1]) == 4
    assert shown[-2] == "and 99 more"
    assert shown[-1].startswith("80 of 120 layers done")


@given(
    st.lists(
        st.builds(part, st.integers(0, 99), st.sampled_from(Stage), st.integers(0, 10)), max_size=130
    ),
    st.lists(st.builds(Task, st.sampled_from(Step), st.text(), st.integers(0, 9), st.integers(0, 9))),
    st.lists(st.text(), max_size=4),
    st.integers(1, 200),
    st.integers(1, 60),
)
def test_it_fits(
    parts: list[Part], tasks: list[Task], waits: list[str], width: int, height: int
) -> None:
    shown = list(lines(headway(parts, tasks=tuple(tasks), waits=tuple(waits)), width, height))
    assert len(shown) <= max(1, height - 1)
    assert all(cell_len(line) <= max(0, width - 1) for line in shown)
    assert all("\n" not in line and "\x1b" not in line for line in shown)


@pytest.mark.parametrize(
    ("rate", "says"), [(0.0, "10.0 MB"), (3e6, "about 3 s left"), (1e4, "about 17 min left")]
)
def test_how_long_it_takes_yet(rate: float, says: str) -> None:
    one = headway([part(1, Stage.FETCHING, 0)])
    assert says in summary(Headway(parts=one.parts, fetch=Amount(0, 10 * MB, rate)))


def test_other_work_is_named() -> None:
    tasks = (Task(Step.READ, "x.tar", 0, 5 * MB), Task(Step.SWEEP, "records", 10, 3))
    reading, sweeping = lines(Headway(tasks=tasks), 80, 24)
    assert re.fullmatch(r"reading    x\.tar +5\.0 MB", reading)
    assert sweeping.endswith("3 of 10 records")
