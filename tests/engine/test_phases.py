"""Where the time goes: each phase is measured on the thread that does it, in whatever process."""

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine.phases import Phase, Spent, collecting, measured, since, total
from engine.testing.archives import archive, layout, member
from tests.command import lamina, lamina_json

BIG = archive(member("big", data=bytes(3 << 20)))


def test_sums_and_differences() -> None:
    one = {Phase.HASH: Spent(1.0, 2.0)}
    both = total(one, {Phase.HASH: Spent(0.5, 0.5), Phase.FETCH: Spent(0.25, 0.0)})
    assert both == {Phase.FETCH: Spent(0.25, 0.0), Phase.HASH: Spent(1.5, 2.5)}
    assert list(both) == [Phase.FETCH, Phase.HASH], "in the order of the bytes"
    assert since(one, both) == {Phase.FETCH: Spent(0.25, 0.0), Phase.HASH: Spent(0.5, 0.5)}


def test_a_job_has_what_all_its_threads_spend() -> None:
    def work() -> None:
        with measured(Phase.HASH):
            sum(range(100_000))

    waits = threading.Event()
    with collecting() as spent:
        thread = threading.Thread(target=work)
        thread.start()
        with measured(Phase.WRITE):
            waits.wait(0.01)
        thread.join()
    assert spent[Phase.HASH].busy > 0
    assert spent[Phase.WRITE].waiting > spent[Phase.WRITE].busy
    work()
    assert set(spent) == {Phase.HASH, Phase.WRITE}, "the job was over"


def test_jobs_that_have_spent_the_same_are_not_taken_for_one_another() -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(collecting())
        spent = second.enter_context(collecting())
        second.close()
        with measured(Phase.HASH):
            pass
    assert not spent, "the job was over"


@pytest.mark.root
def test_an_import_tells_all_phases(tmp_path: Path) -> None:
    image = layout(tmp_path / "image", [BIG], tag="x:1")
    done = lamina_json(tmp_path / "root", "import", "--snapshotter", "overlay", image)
    assert list(done["timings"]) == ["fetch", "inflate", "hash", "write", "commit", "flush"]
    assert all(spent["busy"] > 0 for spent in done["timings"].values())


@pytest.mark.root
def test_a_person_sees_them_when_asked(tmp_path: Path) -> None:
    root, image = tmp_path / "root", layout(tmp_path / "image", [BIG], tag="x:1")
    lamina(root, "import", "--no-unpack", image)
    shown = lamina(root, "unpack", "--snapshotter", "overlay", "--timings", "x:1")
    lines = [line.split() for line in shown.stderr.splitlines()]
    assert ["phase", "busy", "waiting"] in lines
    phases = {line[0] for line in lines if line[2:3] == ["s"]}
    assert phases == {"inflate", "hash", "write", "commit", "flush"}
