"""An import that is cancelled at any step of its tasks leaves nothing, and the next one is whole."""

from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import settings

from engine.app import Engine, open_engine
from engine.kv.schema import INGESTS, LEASE_ITEMS, LEASES, TRASH
from engine.testing.archives import archive, layout, member
from tests.cancelling import cancelled_at
from tests.conftest import AMD64

pytestmark = pytest.mark.root

# Steps between two that are tried; each in the deep profile.
_STRIDE = 1 if settings().max_examples > 100 else 9
LAYERS = [archive(*(member(f"{layer}/{n}", data=b"x") for n in range(30))) for layer in range(3)]


def check_nothing(engine: Engine) -> None:
    stores = engine.stores
    assert list(stores.content.walk()) == list(stores.snapshotter("overlay").walk()) == []
    assert list((stores.root.snapshots / "overlay").iterdir()) == list(stores.root.trash.iterdir()) == []
    with stores.root.meta.read() as txn:
        for table in (LEASES, LEASE_ITEMS, TRASH, INGESTS):
            assert table.survey(txn) == ([], []), table.name
    assert not engine._shop.flights._flights
    assert not engine._shop.twins._first
    assert not engine._shop.arrivals._coming


def test_an_import_cancelled_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    image = layout(tmp_path / "image", LAYERS, tag="x:1")

    async def main() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            imported = partial(engine.import_image, image, snapshotter="overlay")
            nth, goes_on = 1, True
            while goes_on:
                goes_on = await cancelled_at(nth, imported)
                if list(engine.stores.images.walk()):  # it was done, or as good as done
                    assert len(list(engine.stores.snapshotter("overlay").walk())) == len(LAYERS)
                    await engine.remove_image("x:1", collect=True)
                check_nothing(engine)
                nth += _STRIDE
            assert nth > 10 * _STRIDE

    trio.run(main)
