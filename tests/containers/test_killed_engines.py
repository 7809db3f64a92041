"""Containers launched and destroyed while engines are killed leave no trace, and none is lost.

`python -m tests.containers` does it with as many as it is told.
"""

from pathlib import Path

import pytest

from tests.conftest import peer
from tests.containers.harness import store, storm

pytestmark = [pytest.mark.crash, pytest.mark.root]


def test_mc_10_engines_are_killed_one_after_another(tmp_path: Path) -> None:
    """What was launched is found again, as it ended; of what was destroyed nothing is left."""
    peer("runc")
    with store(tmp_path) as root:
        done = storm(root, containers=24, at_once=8, seed="ci")
    assert done.destroyed == 24
    assert done.killed
    assert done.found


def test_mc_10_several_engines_at_once_are_killed(tmp_path: Path) -> None:
    """None of them takes what another makes for what was left half made."""
    peer("runc")
    with store(tmp_path) as root:
        done = storm(root, containers=24, at_once=12, seed="ci", processes=3)
    assert done.destroyed == 24
    assert done.killed
