"""A launch that is cancelled at any step of its tasks leaves nothing, or a container that runs."""

from functools import partial

import pytest
from hypothesis import settings

from tests.cancelling import cancelled_at
from tests.running.scene import IMAGE, Floor, Scene, mounted_below

pytestmark = pytest.mark.root

# Steps between two that are tried; fewer in the deep profile.
_STRIDE = 1 if settings().max_examples > 100 else 3


def test_a_launch_cancelled_at_any_step_leaves_nothing(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        nth, goes_on, ran = 1, True, 0
        while goes_on:
            goes_on = await cancelled_at(nth, partial(floor.launch, "one", "sleep", "1000"))
            if floor.exists("one"):  # it was done, or as good as done
                assert (await floor.containers.status("one")).state == "running"
                await floor.containers.destroy("one")
                ran += 1
            assert not mounted_below(scene.root)
            assert list((scene.root / "containers").glob("*")) == []
            assert list((scene.root / "runtime").glob("*")) == []
            nth += _STRIDE
        assert nth > 5 * _STRIDE
        assert ran < 5
        assert [one.name for one in floor.stores.images.walk()] == [f"docker.io/library/{IMAGE}"]

    scene.run(work)
