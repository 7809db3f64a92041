"""Import and unpack, killed at 50 moments each, leave nothing half done and nothing behind."""

import random
import signal
from pathlib import Path

import pytest

from tests.command import lamina, lamina_json
from tests.crash.conftest import copy_template, written
from tests.crash.harness import Case, again, assert_nothing_half_done, assert_tree, collect_all
from tests.processes import Victim, until

pytestmark = [pytest.mark.crash, pytest.mark.root]

_MOMENTS = 50


def _fractions(seed: str) -> list[float]:
    """Return when to kill, as parts of what a command writes: random, one in each fiftieth."""
    source = random.Random(seed)
    return [round((number + source.random()) / _MOMENTS, 4) for number in range(_MOMENTS)]


def _kill_at(case: Case, command: str, root: Path, fraction: float) -> None:
    copy_template(case, command, root)
    enough = written(root.parent) + fraction * case.growth[command]
    victim = Victim(root, case.arguments(command))
    until(lambda: written(root.parent) >= enough or victim.process.poll() is not None)
    victim.kill()
    code, messages = victim.wait()
    assert code == -signal.SIGKILL or fraction > 0.95, messages


@pytest.mark.parametrize("fraction", _fractions("import"))
def test_a_killed_import_leaves_nothing_half_done(case: Case, root: Path, fraction: float):
    _kill_at(case, "import", root, fraction)
    assert_nothing_half_done(root, named=False)
    again(root, case, "import")
    collect_all(root)


@pytest.mark.parametrize("fraction", _fractions("unpack"))
def test_a_killed_unpack_leaves_nothing_half_done(case: Case, root: Path, fraction: float):
    _kill_at(case, "unpack", root, fraction)
    assert_nothing_half_done(root, named=True)
    again(root, case, "unpack")
    collect_all(root)


@pytest.mark.parametrize("command", ["import", "unpack"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_commands_work_after_a_kill(case: Case, root: Path, command: str, fraction: float):
    # What a person would type next, without a collection in between.
    _kill_at(case, command, root, fraction)
    images = lamina_json(root, "images")
    assert all(row["layers"] == 3 for row in images)
    lamina(root, *case.arguments(command))
    assert_tree(root, case, "overlay")
    lamina(root, "gc")
    keys = [row["key"] for row in lamina_json(root, "snapshots", "ls")]
    assert len(keys) == 3
    assert not [key for key in keys if key.startswith("extract-")]
    lamina(root, "image", "rm", "image")
    assert len(lamina_json(root, "gc")["snapshots"]) == 3
    collect_all(root)
