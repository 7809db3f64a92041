"""A process that dies while it clears up after one that died: as often as it may happen."""

import random
import signal
from pathlib import Path

import pytest

from engine.images.states import parts_of
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.command import lamina
from tests.crash.harness import assert_nothing_half_done, collect_all
from tests.processes import Victim

pytestmark = [pytest.mark.crash, pytest.mark.root]

_POINTS = ("gc.marked", "gc.swept", "trash.moved", "trash.emptied", "space.punched")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    source = random.Random("image")  # of bytes that do not pack: what is freed are whole pages
    sizes = (3 << 20, 1 << 20, 100)
    layers = [archive(member(f"{n}", data=source.randbytes(n))) for n in sizes]
    return layout(tmp_path / "image", layers)


def _die(root: Path, words: list[str], point: str) -> int:
    code, _ = Victim(root, words, f"{point}=kill").wait()
    return code


@pytest.mark.parametrize("point", _POINTS)
def test_p2_gc_09_dying_while_clearing_up(root: Path, image: Path, point: str):
    words = ["import", "--snapshotter", "overlay", str(image)]
    assert _die(root, words, "snapshot.commit.recorded") == -signal.SIGKILL
    assert _die(root, ["gc"], point) == -signal.SIGKILL, "the point was not reached"
    # The mark of the dead is not over, and its list of what was touched is nobody's.
    assert _die(root, words, "import.named") == -signal.SIGKILL
    assert _die(root, ["gc"], point) in {-signal.SIGKILL, 0}
    assert_nothing_half_done(root, named=True)
    with open_stores(root, "default", host_platform()) as stores:
        (found,) = stores.images.walk()
        assert parts_of(stores, stores.resolve(found.target)).unpacked
    lamina(root, "fsck")
    collect_all(root)
