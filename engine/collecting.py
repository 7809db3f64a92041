"""Collects a store from an event loop: when asked to, or in the background by a schedule.

Async. The work is done on a thread, in steps; a cancel ends it between two of them, cleanly.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from engine.gc.activity import Seen
from engine.gc.collect import Collected
from engine.gc.policy import Policy
from engine.gc.scheduler import Schedule, Scheduler, scheduling
from engine.progress import Step
from engine.stores import Stores

__all__ = ["Collect", "collecting", "collector"]

Collect = Callable[[], Awaitable[Collected]]

_log = logging.getLogger(__name__)


@asynccontextmanager
async def collecting(stores: Stores, schedule: Schedule | None) -> AsyncIterator[Collect]:
    """Collect by a schedule, if there is one, during the block; give what asks for a collection."""
    if schedule is None:
        yield collector(stores)
        return
    policy = schedule.policy
    scheduler = Scheduler(schedule, collector(stores, policy), partial(_look, stores, policy))
    async with scheduling(scheduler):
        yield scheduler.collect


def collector(stores: Stores, policy: Policy | None = None) -> Collect:
    """Return what collects, and removes what a policy lets go."""
    return partial(_collect, stores, policy)


async def _collect(stores: Stores, policy: Policy | None) -> Collected:
    def report(_step: Step, _item: str, _total: int, _done: int) -> None:
        trio.from_thread.check_cancelled()

    def work() -> Collected:
        if policy is None:
            return stores.collect(report=report)
        enforced = stores.enforce(policy, report=report)
        for one in enforced.chosen:
            _log.info("removed image %s for the sake of %s", " ".join(one.names), one.why)
        return enforced.collected

    return await trio.to_thread.run_sync(work)


async def _look(stores: Stores, policy: Policy | None, since: int, before: Seen) -> Seen:
    return await trio.to_thread.run_sync(stores.glance, since, before, policy)
