"""A launch that is cancelled at any step of its tasks leaves nothing, or a container that runs."""

import pytest
import trio
from hypothesis import settings

from tests.running.scene import IMAGE, Floor, Scene, mounted_below

pytestmark = pytest.mark.root

# Steps between two that are tried; fewer in the deep profile.
_STRIDE = 1 if settings().max_examples > 100 else 3


class _Canceller(trio.abc.Instrument):
    """Cancels a scope before the nth step that any task takes, and counts them."""

    def __init__(self, scope: trio.CancelScope, nth: int) -> None:
        self.steps = 0
        self._scope = scope
        self._nth = nth

    def before_task_step(self, _task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self._nth:
            self._scope.cancel()


async def cancelled_at(floor: Floor, nth: int) -> bool:
    """Launch a container, cancelled at a step; say whether there were so many."""
    with trio.CancelScope() as scope:
        canceller = _Canceller(scope, nth)
        trio.lowlevel.add_instrument(canceller)
        try:
            await floor.launch("one", "sleep", "1000")
        finally:
            trio.lowlevel.remove_instrument(canceller)
    return canceller.steps >= nth


def test_a_launch_cancelled_at_any_step_leaves_nothing(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        nth, goes_on, ran = 1, True, 0
        while goes_on:
            goes_on = await cancelled_at(floor, nth)
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
