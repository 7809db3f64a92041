"""Several processes at random work on one store, some of which are killed: nothing is lost."""

import pytest

from tests.filesystems import shared_memory
from tests.stress.running import stress

pytestmark = [pytest.mark.crash, pytest.mark.root]


def test_p2_p6_nothing_is_lost_and_nobody_is_stuck():
    with shared_memory() as folder:
        found = stress(folder, seconds=10, processes=4)
    assert found.killed >= 2
    assert found.done.total() > 100
