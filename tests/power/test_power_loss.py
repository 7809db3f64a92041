"""Whenever the power goes: nothing that was committed is lost, nothing is there by half."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.filesystems import shared_memory
from tests.power.checking import Checker
from tests.power.disk import cuts
from tests.power.trace import Punched, Recorded, Synced, Written, record

_IMAGES = 2000
_PARTS = 4  # of the images, so that several processors share them


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recorded]:
    with shared_memory() as folder:
        yield record(folder, "suite")


@pytest.fixture
def checker(recorded: Recorded) -> Iterator[Checker]:
    with TemporaryDirectory(dir=recorded.root.parent) as folder:
        yield Checker(recorded, Path(folder))


@pytest.mark.parametrize("part", range(_PARTS))
def test_what_a_power_cut_leaves(recorded: Recorded, checker: Checker, part: int) -> None:
    for cut in cuts(recorded, _IMAGES, "suite"):
        if cut.number % _PARTS == part:
            checker.check(cut)


def test_the_workload_does_some_of_everything(recorded: Recorded) -> None:
    kinds = {(type(event), event.file) for event in recorded.events}
    assert kinds >= {(kind, file) for kind in (Written, Synced) for file in "mb"} | {(Punched, "b")}
    heads = [event for event in recorded.events if isinstance(event, Written) and event.through]
    # What LMDB trusts a disk to write whole, each within one sector (`disk`).
    assert {(event.start % 4096, len(event.data)) for event in heads} == {(32, 120)}
    reached = [{table for table, rows in state.items() if rows} for state in recorded.states["m"]]
    assert set.union(*reached) >= {
        "blobs",
        "ingests",
        "images",
        "leases",
        "lease_items",
        "trash",
        "small",
    }
    assert len(recorded.states["m"]) > 40
    assert len(recorded.states["b"]) > 15


@pytest.mark.parametrize("lie", ["a flush", "a flush of records", "a hole", "a byte"])
def test_a_disk_that_lies_is_found_out(recorded: Recorded, checker: Checker, lie: str) -> None:
    """Else the checks would see nothing."""
    source = random.Random(lie)
    events = list(recorded.events)
    if lie == "a flush":
        events = [event for event in events if not isinstance(event, Synced)]
    elif lie == "a flush of records":
        events = [event for event in events if event != Synced("m")]
    else:
        last = max(i for i, event in enumerate(events) if event == Synced("b"))
        written = [e for e in events[:last] if isinstance(e, Written) and len(e.data) > 300_000]
        chosen = max(written[-2:], key=lambda event: len(event.data))
        at = chosen.start + len(chosen.data) // 2
        change = Punched("b", at & -4096, 4096) if lie == "a hole" else Written("b", at, b"?", False)
        events[last:last] = [change] * (source.randrange(2) + 1)
    lying = dataclasses.replace(recorded, events=events)
    with pytest.raises(AssertionError):  # noqa: PT012  of any of them
        for cut in cuts(lying, 500, "lie"):
            checker.check(cut)
