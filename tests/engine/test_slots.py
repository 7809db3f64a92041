"""Places for layers: a bounded number, the lowest in order next, given up while bytes are waited for."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from engine.unpack.slots import Order, Slots


class Asker:
    """Asks for a place, and keeps it until told."""

    def __init__(self, slots: Slots, order: Order, log: list[Order]) -> None:
        self.go = trio.Event()
        self.scope = trio.CancelScope()
        self._slots, self._order, self._log = slots, order, log

    async def __call__(self) -> None:
        with self.scope:
            async with self._slots.slot(self._order):
                self._log.append(self._order)
                await self.go.wait()


async def begin(nursery: trio.Nursery, slots: Slots, *orders: Order) -> tuple[list[Asker], list[Order]]:
    log: list[Order] = []
    askers = []
    for order in orders:
        askers.append(Asker(slots, order, log))
        nursery.start_soon(askers[-1])
        await trio.testing.wait_all_tasks_blocked()
    return askers, log


def run(test: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await test(nursery)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_of_those_that_wait_the_lowest_is_next() -> None:
    async def test(nursery: trio.Nursery) -> None:
        askers, log = await begin(nursery, Slots(1), (1, 5), (2, 0), (1, 9), (1, 2))
        for asker in (askers[0], askers[3], askers[2]):
            asker.go.set()
            await trio.testing.wait_all_tasks_blocked()
        assert log == [(1, 5), (1, 2), (1, 9), (2, 0)]

    run(test)


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_who_is_cancelled_takes_no_place_away(cancelled: int) -> None:
    async def test(nursery: trio.Nursery) -> None:
        slots = Slots(1)
        askers, log = await begin(nursery, slots, (0,), (1,), (2,))
        askers[cancelled].scope.cancel()
        for asker in askers:
            asker.go.set()
            await trio.testing.wait_all_tasks_blocked()
        assert log == [(number,) for number in range(3) if number in {0, *{1, 2} - {cancelled}}]
        (_,), again = await begin(nursery, slots, (7,))
        assert again == [(7,)]

    run(test)


def test_one_that_is_cancelled_as_it_gets_a_place_passes_it_on() -> None:
    async def test(nursery: trio.Nursery) -> None:
        slots = Slots(1)
        await slots.take((0,))
        askers, log = await begin(nursery, slots, (1,), (2,))
        askers[0].scope.cancel()
        slots.leave()  # before the one that is cancelled has a turn
        await trio.testing.wait_all_tasks_blocked()
        assert log == [(2,)]

    run(test)


def test_a_place_given_up_is_had_by_another_and_waited_for_again() -> None:
    async def test(nursery: trio.Nursery) -> None:
        slots = Slots(1)
        bytes_came = trio.Event()
        log: list[str] = []

        async def starved() -> None:
            async with slots.slot((0,)) as slot:
                async with slot.given_up():
                    log.append("gives up")
                    await bytes_came.wait()
                log.append("goes on")

        nursery.start_soon(starved)
        await trio.testing.wait_all_tasks_blocked()
        (other,), had = await begin(nursery, slots, (5,))
        assert had == [(5,)]
        bytes_came.set()
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["gives up"]
        other.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["gives up", "goes on"]
        (_,), had = await begin(nursery, slots, (6,))
        assert had == [(6,)]

    run(test)


def test_one_that_is_cancelled_without_his_place_gives_none_back() -> None:
    async def test(nursery: trio.Nursery) -> None:
        slots = Slots(1)
        scope = trio.CancelScope()

        async def starved() -> None:
            with scope:
                async with slots.slot((0,)) as slot, slot.given_up():
                    await trio.sleep_forever()

        nursery.start_soon(starved)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        _, had = await begin(nursery, slots, (1,), (2,))
        assert had == [(1,)]

    run(test)
