"""The same work once: callers share it, each can leave alone, the last one to leave ends it."""

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from engine.errors import FailedPrecondition, Refused
from engine.progress import Step, silent
from engine.unpack.flights import Flight, Flights


class Work:
    """Work that a test lets go on, and what became of each start of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.go = trio.Event()
        self.error: Exception | None = None

    @asynccontextmanager
    async def __call__(self, flight: Flight[int]) -> AsyncIterator[int]:
        self.log.append("started")
        try:
            flight.report(Step.UNPACK, "x", 2, 1)
            await self.go.wait()
            if self.error:
                raise self.error
            self.log.append("done")
            yield 7
            self.log.append("let go")
        except trio.Cancelled:
            self.log.append("cancelled")
            raise


def flown(test: Callable[[Flights[Flight[int]], Work], object]) -> None:
    async def main() -> None:
        with trio.fail_after(10):
            await test(Flights(Flight), Work())  # type: ignore[misc, func-returns-value]

    trio.run(main)


async def call(flights: Flights[Flight[int]], work: Work, results: list[int]) -> None:
    async with flights.caller(silent) as join:
        flight = join("key", work)
        results.append(await flight.result())


def test_callers_share_one_run() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        results: list[int] = []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(call, flights, work, results)
            await trio.testing.wait_all_tasks_blocked()
            work.go.set()
        assert results == [7] * 5
        assert work.log == ["started", "done", "let go"]
        assert flights._flights == {}

    flown(test)


def test_what_is_held_is_held_until_the_last_caller_left() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        work.go.set()
        async with flights.caller(silent) as join:
            first = join("key", work)
            async with flights.caller(silent) as join:
                second = join("key", work)
                assert first is second
                await second.result()
            assert work.log == ["started", "done"]
            # One that comes now has the same result, and no second run.
            async with flights.caller(silent) as join:
                third = join("key", work)
                assert await third.result() == 7
            assert work.log == ["started", "done"]
        assert work.log == ["started", "done", "let go"]

    flown(test)


def test_each_caller_leaves_alone_and_the_last_one_cancels() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        scopes = [trio.CancelScope() for _ in range(3)]

        async def one(scope: trio.CancelScope) -> None:
            with scope:
                await call(flights, work, [])

        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(one, scope)
            for scope in scopes:
                await trio.testing.wait_all_tasks_blocked()
                assert work.log == ["started"]
                scope.cancel()
        assert work.log == ["started", "cancelled"]
        assert flights._flights == {}

    flown(test)


def test_a_failure_reaches_all_and_is_not_joined_again() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        work.error = Refused("no")
        errors: list[Exception] = []

        async def one() -> None:
            async with flights.caller(silent) as join:
                flight = join("key", work)
                try:
                    await flight.result()
                except Refused as error:
                    errors.append(error)
                    # While this caller still holds the failed one, another starts afresh.
                    work.error = None
                    async with flights.caller(silent) as join:
                        second = join("key", work)
                        assert second is not flight
                        assert await second.result() == 7
                    assert flights._flights.get("key") is not flight

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            work.go.set()
        assert len(errors) == 2
        assert flights._flights == {}

    flown(test)


def test_one_that_is_being_cancelled_is_not_joined_nor_taken_for_the_new_one() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        ending, may_end = trio.Event(), trio.Event()

        @asynccontextmanager
        async def slow(_flight: Flight[int]) -> AsyncIterator[int]:
            try:
                await trio.sleep_forever()
                yield 0
            finally:
                ending.set()
                with trio.CancelScope(shield=True):
                    await may_end.wait()

        async def leaves() -> None:
            with trio.CancelScope() as scope:
                async with flights.caller(silent) as join:
                    join("key", slow)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()

        work.go.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaves)
            await ending.wait()
            async with flights.caller(silent) as join:
                second = join("key", work)
                assert await second.result() == 7
                may_end.set()
                await trio.testing.wait_all_tasks_blocked()
                assert flights._flights["key"] is second

    flown(test)


@pytest.mark.parametrize("callers", [1, 3])
def test_every_caller_is_told_of_progress(callers: int) -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        told: list[int] = []

        def report(step: Step, _item: str, _total: int, done: int, /) -> None:
            if step is Step.UNPACK:
                told.append(done)

        async def one() -> None:
            async with flights.caller(report) as join:
                flight = join("key", work)
                await flight.result()

        async with trio.open_nursery() as nursery:
            for _ in range(callers):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            work.go.set()
        assert told
        assert set(told) == {1}

    flown(test)


def test_who_leaves_a_failed_one_takes_no_newer_one_away() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        work.go.set()
        work.error = Refused("no")
        async with flights.caller(silent) as rejoin:
            async with flights.caller(silent) as join:
                with pytest.raises(Refused):
                    await join("key", work).result()
                work.error = None
                newer = rejoin("key", work)
                assert await newer.result() == 7
            # The failed one's last caller left; the newer one is still what the key means.
            async with flights.caller(silent) as third:
                assert third("key", work) is newer
        assert flights._flights == {}

    flown(test)


def test_who_is_cancelled_waits_until_the_work_holds_nothing() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        held = trio.Event()

        @asynccontextmanager
        async def slow(flight: Flight[int]) -> AsyncIterator[int]:
            async with work(flight) as value:
                yield value
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                held.set()

        with trio.CancelScope() as scope:
            async with flights.caller(silent) as join:
                flight = join("key", slow)
                work.go.set()
                await flight.result()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert held.is_set()

    flown(test)


def test_an_interrupt_within_the_work_is_the_main_tasks() -> None:
    """trio raises Ctrl-C in whatever task runs, also in one that belongs to no caller."""

    async def interrupted() -> None:
        await trio.lowlevel.checkpoint()
        signal.raise_signal(signal.SIGINT)

    @asynccontextmanager
    async def work(_flight: Flight[int]) -> AsyncIterator[int]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await trio.sleep_forever()
        yield 7

    async def test(flights: Flights[Flight[int]], _work: Work) -> None:
        async with flights.caller(silent) as join:
            await join("key", work).result()

    with pytest.raises(KeyboardInterrupt):
        flown(test)


def test_who_joins_late_is_told_where_all_is() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        told: list[list[tuple[Step, str, int, int]]] = [[], []]

        async def caller(into: list[tuple[Step, str, int, int]]) -> None:
            async with flights.caller(lambda *one: into.append(one)) as join:
                await join("key", work).result()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller, told[0])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(caller, told[1])
            await trio.testing.wait_all_tasks_blocked()
            work.go.set()
        assert told[1][:3] == [
            (Step.SHARE, "", 1, 1),
            (Step.UNPACK, "x", 2, 1),
            (Step.SHARE, "", 2, 2),
        ]
        assert told[0][:3] == [
            (Step.SHARE, "", 1, 1),
            (Step.UNPACK, "x", 2, 1),
            (Step.SHARE, "", 2, 2),
        ]

    flown(test)


def test_what_is_under_way_is_ended_and_its_callers_are_told() -> None:
    async def test(flights: Flights[Flight[int]], work: Work) -> None:
        async def caller() -> None:
            with pytest.raises(FailedPrecondition, match="closed"):
                await call(flights, work, [])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller)
            nursery.start_soon(caller)
            await trio.testing.wait_all_tasks_blocked()
            await flights.aclose()
            assert work.log == ["started", "cancelled"]
        await flights.aclose()

    flown(test)
