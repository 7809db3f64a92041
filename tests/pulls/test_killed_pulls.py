"""A pull that is killed is gone on with: nothing half done, nothing fetched twice, nothing left.

`python -m tests.pulls` kills at as many moments as it is told.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import lamina
from tests.filesystems import shared_memory
from tests.pulls.harness import Moment, Pullable, assert_gone_on_with, killed, moments, pullable

pytestmark = [pytest.mark.crash, pytest.mark.root]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


@pytest.fixture(scope="module")
def image(place: Path) -> Iterator[Pullable]:
    with pullable(place) as made:
        yield made


@pytest.mark.parametrize("moment", moments("ci", 12), ids=str)
def test_ms_15_cri_13_a_killed_pull_is_gone_on_with(
    moment: Moment, image: Pullable, place: Path
) -> None:
    root = place / str(moment) / "root"
    root.parent.mkdir()
    killed(image, root, moment)
    assert_gone_on_with(image, root, moment)
    shutil.rmtree(root.parent)


def test_up_12_up_20d_what_was_verified_is_labelled_with_the_commit(
    image: Pullable, place: Path
) -> None:
    root = place / "labelled" / "root"
    root.parent.mkdir()
    lamina(root, *image.words, code=-signal.SIGKILL, failpoints="snapshot.commit.recorded=kill")
    assert_gone_on_with(image, root, Moment("commit", 1, collects=False))
    shutil.rmtree(root.parent)
