"""A worker that is killed, at any moment, is an ordinary error that leaves nothing; a retry mends it."""

import random
from pathlib import Path

import pytest
import trio

from engine import failpoints
from engine.app import Engine, open_engine
from engine.errors import Unavailable
from engine.testing.archives import archive, layout, member
from tests.conftest import AMD64

pytestmark = [pytest.mark.crash, pytest.mark.root]

_TIMES, _PARTS = 200, 4
_LAYERS = (3, 40, 12)  # files of each
_POINTS = {  # how often a worker passes there, at most
    "apply.entry": max(_LAYERS),
    "apply.finish": 1,
    "snapshot.commit.settled": 1,
    "snapshot.commit.flushed": 1,
}


def _moments() -> list[str]:
    """Return points and passages, most of them within a layer."""
    source = random.Random("killed workers")
    names = source.choices(list(_POINTS), weights=[7, 1, 1, 1], k=_TIMES)
    return [f"{name}=kill@{source.randint(1, _POINTS[name])}" for name in names]


@pytest.mark.parametrize("part", range(_PARTS))
def test_a_killed_worker_is_an_error_that_a_retry_mends(tmp_path: Path, part: int) -> None:
    layers = [
        archive(*(member(f"{number}/{n}", data=b"%d" % n) for n in range(files)))
        for number, files in enumerate(_LAYERS)
    ]
    image = layout(tmp_path / "image", layers, tag="x:1")

    async def one(engine: Engine, moment: str) -> None:
        name, _, nth = moment.partition("=kill@")
        with (
            failpoints.armed(name, "kill", int(nth)),
            pytest.raises(Unavailable, match="worker process was killed by signal 9"),
        ):
            await engine.import_image(image, snapshotter="overlay")
        backend = engine.stores.snapshotter("overlay")
        assert list(backend.walk()) == list(engine.stores.images.walk()) == []
        assert list((engine.stores.root.snapshots / "overlay").iterdir()) == []
        await engine.import_image(image, snapshotter="overlay")
        tops = [info.key for info in backend.walk()]
        assert len(tops) == len(_LAYERS)
        trees = (engine.stores.root.snapshots / "overlay").glob("*/fs/*/*")
        assert len(list(trees)) == sum(_LAYERS)
        await engine.remove_image("x:1", collect=True)

    async def main() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            for moment in _moments()[part::_PARTS]:
                await one(engine, moment)

    trio.run(main)
