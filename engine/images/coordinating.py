"""Images held for owners (tasks, pods, whoever comes and goes): brought in when the first asks, and gone
some time after the last has left.

Async. What is held, and for whom, are records (`engine.metadata.references`); here is what waits and can
be cancelled. From before a pull starts until its reference is written, a lease of this process holds
what the name meant and what the pull brings: there is no moment at which a collection, or another's
release, could take an image between its pull and its reference. If the process dies between, there is
neither a reference nor anything that lasts.

Removal is the collection that finds the last reference expired: with `open_engine(gc=Schedule())` on
time, tried again if it fails, by any process, after a restart too.
"""

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from engine import limits
from engine.app import Engine
from engine.beside import beside
from engine.errors import InvalidArgument, NotFound, Unavailable
from engine.failpoints import hit
from engine.images.admitting import Admission
from engine.images.facts import ImageFacts
from engine.kv.schema import now
from engine.metadata.references import HeldImage, check_owner
from engine.oci.platform import Platform
from engine.oci.reference import familiar, parse_reference
from engine.progress import Report, Step, silent
from engine.unpack.lease import begun_lease

if TYPE_CHECKING:  # which loads httpcore
    from engine.registry.client import Client

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)

_LOOKS = 10  # whether a pull gets on, in the time in which it has to


class Coordinator:
    """Holds images of an open engine for owners; its methods may run concurrently."""

    def __init__(
        self,
        engine: Engine,
        *,
        delay_s: float = limits.REMOVE_DELAY_S,
        at_once: int = limits.PULLS,
        stall_s: float = limits.PULL_STALL_S,
        cleanup: bool = True,
    ) -> None:
        """An image goes `delay_s` after its last release; without `cleanup` nothing is held, or removed.

        So many different images are pulled at once, and a pull that does not get on for `stall_s` ends.
        """
        if delay_s < 0 or stall_s <= 0 or at_once < 1:
            raise InvalidArgument("a coordinator needs a delay, a time to stall and a number of pulls")
        self._engine = engine
        self._stores = engine.stores
        self._facts = ImageFacts(engine.stores)
        self._admission = Admission(at_once)
        self._delay_s = delay_s
        self._stall_s = stall_s
        self._cleanup = cleanup

    async def acquire(
        self,
        name: str,
        owner: str,
        client: "Client",
        *,
        snapshotter: str | None = None,
        platform: Platform | None = None,
        strict: bool = False,
        report: Report = silent,
    ) -> HeldImage:
        """Pull an image and hold it for an owner until he releases it; the same owner counts once.

        The registry is asked each time, with this caller's own client: what is here already is neither
        taken for what the name means now, nor given to who may not have it.

        Raises what `Engine.pull` does, Unavailable also for a pull that does not get on. Who fails
        holds nothing.
        """
        check_owner(owner)
        stores, full = self._stores, str(parse_reference(name))
        async with begun_lease(stores.root.meta, stores.namespace) as lease:
            await trio.to_thread.run_sync(stores.references.guard, lease.id, full)
            async with self._admission.admitted(full), self._getting_on(full, report) as noting:
                pulled = await self._engine.using(lease.id).pull(
                    full,
                    client,
                    snapshotter=snapshotter,
                    platform=platform,
                    strict=strict,
                    lasting=not self._cleanup,
                    report=noting,
                )
            hit("hold.pulled")
            target = pulled.image.target
            image = await trio.to_thread.run_sync(self._facts.id_of, target, platform)
            return await self._take(owner, image, target.digest, full)

    async def hold(self, image: str, owner: str) -> HeldImage:
        """Hold an image that is here, by its name, its ID or a digest; no registry is asked.

        NotFound if it is not here, or could not be run.
        """
        check_owner(owner)
        known = await trio.to_thread.run_sync(self._facts.find, image)
        if known is None or not known.is_ready:
            raise NotFound(f"image {image} is not here, or not unpacked; acquire it")
        full = str(parse_reference(image))
        name = full if full in {*known.repo_tags, *known.repo_digests} else ""
        return await self._take(owner, known.id, known.target, name)

    async def _take(self, owner: str, image: str, target: str, name: str) -> HeldImage:
        if not self._cleanup:
            return HeldImage(owner=owner, image=image, name=name, target=target, since=now())
        taking = partial(self._stores.references.take, owner, image, target, name)
        held = await trio.to_thread.run_sync(taking)
        hit("hold.taken")
        return held

    async def release(self, image: str, owner: str) -> bool:
        """Release what an owner holds of an image, by its ID, name or digest; say whether he held it.

        Nothing is removed yet: who takes it before the delay is over has it at once.
        """
        if not self._cleanup:
            return False
        meant = {image}
        with suppress(InvalidArgument):  # an ID is no name
            meant.add(str(parse_reference(image)))
        releasing = partial(self._stores.references.release, owner, meant, delay_s=self._delay_s)
        released = await trio.to_thread.run_sync(releasing)
        if not released:
            _log.warning("%s holds no image %s: nothing to release", owner, image)
        hit("hold.released")
        return bool(released)

    async def retain(self, owners: Collection[str]) -> list[HeldImage]:
        """Release what all other owners hold: for who was restarted, and knows which there are still."""
        if isinstance(owners, str):
            raise InvalidArgument("retain takes a list of owners, not one")
        if not self._cleanup:
            return []
        retaining = partial(self._stores.references.retain, owners, delay_s=self._delay_s)
        return await trio.to_thread.run_sync(retaining)

    async def held(self) -> list[HeldImage]:
        """Return what is held, the oldest first, and what was released and is still to go."""
        return await trio.to_thread.run_sync(self._stores.references.walk)

    @asynccontextmanager
    async def _getting_on(self, name: str, report: Report) -> AsyncIterator[Report]:
        """Give a report to a pull, and end it with Unavailable once that tells nothing new for long."""
        seen: dict[tuple[Step, str], int] = {}
        news = [True]

        def noting(step: Step, item: str, total: int, done: int, /) -> None:
            if seen.get((step, item)) != done:
                seen[step, item] = done
                news[0] = True
            report(step, item, total, done)

        async def watch() -> None:
            still = 0
            while still < _LOOKS:
                await trio.sleep(self._stall_s / _LOOKS)
                still = 0 if news[0] else still + 1
                news[0] = False
            scope.cancel()

        with trio.CancelScope() as scope:
            async with beside() as nursery:
                nursery.start_soon(watch)
                yield noting
        if scope.cancelled_caught:
            raise Unavailable(
                f"nothing of image {familiar(name)} came for {self._stall_s:g} s; pull it again later"
            )
