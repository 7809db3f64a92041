"""Removes containers: children first, once for all who ask, again where it failed.

Async. A container that somebody works on is told so by its record, and is his to remove; whoever else
wants it gone waits for that.
"""

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from engine import limits
from engine.errors import EngineError, FailedPrecondition
from engine.failpoints import hit
from engine.kv.schema import Container
from engine.metadata.containers import may_run
from engine.metadata.provisions import IsMeant, Removing, anyone
from engine.provision.rootfs import RootFileSystems, joined
from engine.stores import Stores

__all__ = ["FIRST_LOOK_S", "Destroyer", "Stop", "rest"]

Stop = Callable[[Container], Awaitable[None]]
"""Sees to it that nothing runs in a container any more, and that nothing of its runtime is left.

Called, and perhaps called again after a crash, with the record of a container that is `destroying`,
before anything of it is unmounted; raises if it cannot be done, and then the container stays.
"""

FIRST_LOOK_S = 0.001


class Destroyer:
    """Removes the containers of some stores."""

    def __init__(self, stores: Stores, roots: RootFileSystems, stop: Stop | None) -> None:
        """`stop` ends what runs in a container; without it one that may run is not removed."""
        self._containers = stores.containers
        self._provisions = stores.provisions
        self._roots = roots
        self._stop = stop

    async def destroy(
        self, container: str, above: frozenset[str] = frozenset(), is_meant: IsMeant = anyone
    ) -> bool:
        """Remove a container that is not among those `above`; False if there is none that is meant."""
        removing: Removing | None = None
        with trio.CancelScope(shield=True):
            removing = await trio.to_thread.run_sync(self._begin, container, is_meant)
            if removing is not None and removing.is_mine:
                await self._remove(removing.container, above)
        if removing is None:
            return False
        return removing.is_mine or await self._joined(removing.container, above)

    def _begin(self, container: str, is_meant: IsMeant) -> Removing | None:
        found = self._containers.find(container)
        if found is not None and self._stop is None and may_run(found[0]):
            raise FailedPrecondition(
                f"container {container} may be running, and nobody here can stop it; "
                f"remove it with `lamina rm --force {container}`"
            )
        removing = self._provisions.removing(container, is_meant=is_meant)
        hit("destroy.recorded")
        return removing

    async def _joined(self, removing: Container, above: frozenset[str]) -> bool:
        """Wait until somebody else has removed a container; raise what he would."""
        pause = FIRST_LOOK_S
        while True:
            found = await trio.to_thread.run_sync(self._containers.find, removing.id)
            if found is None or found[0].unique != removing.unique:
                return True
            container, is_held = found
            if container.errors > removing.errors:
                raise EngineError(container.error)
            if is_held:
                pause = await rest(pause)
            else:  # he died, or left it
                await self.destroy(removing.id, above, lambda one, _: one.unique == removing.unique)
                return True

    async def undo(self, mine: Container) -> bool:
        """Remove a container that the caller is making; say whether somebody else asked for that.

        What fails stays in the record: what failed first says more.
        """
        removing: Removing | None = None
        with trio.CancelScope(shield=True):
            begin = partial(self._provisions.removing, mine.id, mine=mine.lease)
            removing = await trio.to_thread.run_sync(begin)
            if removing is not None:
                await self._remove(removing.container, frozenset())
        return removing is not None and removing.was_asked

    async def _remove(self, mine: Container, above: frozenset[str]) -> None:
        """Remove a container that is ours to remove; what fails stays in its record."""
        try:
            await self._remove_children(mine, above | {mine.id})
            if self._stop is not None:
                await self._stop(mine)
            await trio.to_thread.run_sync(self._roots.unmake, mine)
        except BaseException as error:
            why = str(error) if isinstance(error, EngineError) else repr(error)
            await trio.to_thread.run_sync(self._provisions.failed, mine, why)
            raise

    async def _remove_children(self, mine: Container, above: frozenset[str]) -> None:
        errors: list[EngineError] = []
        for child in await trio.to_thread.run_sync(self._containers.children, mine.id):
            if child not in above:
                try:
                    await self.destroy(child, above, lambda one, _: one.parent == mine.id)
                except EngineError as error:
                    errors.append(error)
        if errors:
            raise joined(errors)


async def rest(pause: float) -> float:
    """Sleep, and return for how long to sleep the next time."""
    await trio.sleep(pause)
    return min(2 * pause, limits.CONTAINER_LOOK_S)
