"""A process that dies at any named point leaves nothing half done and nothing behind."""

import signal
from pathlib import Path

import pytest

from tests.crash.conftest import copy_template
from tests.crash.harness import Case, again, assert_nothing_half_done, collect_all
from tests.processes import Victim

pytestmark = [pytest.mark.crash, pytest.mark.root]

# Where the main process dies: command, point, and which of its hits.
_MAIN = (
    ("import", "content.ingest.begun", (1, 3, 5)),
    ("import", "content.ingest.written", (1, 3)),
    ("import", "content.commit.before", (1, 2, 5)),
    ("import", "content.commit.after", (1, 2, 5)),
    ("import", "import.labelled", (1,)),
    ("import", "import.named", (1,)),
    ("import", "snapshot.prepare.recorded", (1, 3)),
    ("import", "snapshot.prepare.made", (1, 3)),
    ("import", "snapshot.commit.recorded", (1,)),
    ("import", "unpack.anchored", (1,)),
    ("unpack", "snapshot.prepare.recorded", (2,)),
    ("unpack", "snapshot.prepare.made", (2,)),
    ("unpack", "snapshot.commit.recorded", (1,)),
    ("unpack", "unpack.anchored", (1,)),
    ("gc", "gc.marked", (1,)),
    ("gc", "gc.swept", (1,)),
    ("gc", "trash.moved", (1, 3)),
    ("gc", "trash.emptied", (1,)),
    ("gc", "space.punched", (1, 2)),
)
# Where a worker dies, which the main process survives to report.
_WORKER = (
    ("import", "apply.entry", (1, 300)),
    ("import", "apply.finish", (1,)),
    ("unpack", "apply.entry", (200,)),
    ("unpack", "apply.finish", (1,)),
    ("import", "snapshot.commit.settled", (1,)),
    ("import", "snapshot.commit.flushed", (1,)),
    ("unpack", "snapshot.commit.settled", (1,)),
)
# The copy backend does its work at commit: there it has most to lose. Which process dies, and its code.
_COPY = {
    "snapshot.prepare.made": -signal.SIGKILL,
    "snapshot.commit.settled": 7,
    "snapshot.commit.recorded": -signal.SIGKILL,
}


def _cases(table: tuple[tuple[str, str, tuple[int, ...]], ...]) -> list[tuple[str, str, int]]:
    return [(command, name, nth) for command, name, hits in table for nth in hits]


def _run_into(
    case: Case, command: str, root: Path, term: str, backend: str = "overlay"
) -> tuple[int, str]:
    copy_template(case, command, root)
    return Victim(root, case.arguments(command, backend), term).wait()


def _assert_recovers(root: Path, case: Case, command: str, backend: str = "overlay") -> None:
    assert_nothing_half_done(root, named=command == "unpack")
    if command != "gc":
        again(root, case, command, backend)
    collect_all(root)


@pytest.mark.parametrize(("command", "name", "nth"), _cases(_MAIN))
def test_dying_at_a_point_leaves_nothing_half_done(
    case: Case, root: Path, command: str, name: str, nth: int
):
    code, messages = _run_into(case, command, root, f"{name}=kill@{nth}")
    assert code == -signal.SIGKILL, messages or "the point was not reached"
    _assert_recovers(root, case, command)


@pytest.mark.parametrize("name", _COPY)
def test_dying_with_the_copy_backend_leaves_nothing_half_done(case: Case, root: Path, name: str):
    code, messages = _run_into(case, "unpack", root, f"{name}=kill@1", "copy")
    assert code == _COPY[name], messages or "the point was not reached"
    _assert_recovers(root, case, "unpack", "copy")


@pytest.mark.parametrize(("command", "name", "nth"), _cases(_WORKER))
def test_a_dying_worker_is_an_ordinary_error(case: Case, root: Path, command: str, name: str, nth: int):
    code, messages = _run_into(case, command, root, f"{name}=kill@{nth}")
    assert code == 7, messages or "the point was not reached"
    assert "a worker process was killed by signal 9" in messages
    assert len(messages.splitlines()) == 1
    _assert_recovers(root, case, command)
