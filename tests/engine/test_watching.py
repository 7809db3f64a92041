"""Progress as a stream: who reads slowly has the latest, who joins late has all, nobody is held up."""

import threading

import trio
import trio.testing

from engine.observing.watching import Watch
from engine.progress import Headway, Stage, Step


def on_a_clock(work: object) -> None:
    async def main() -> None:
        with trio.fail_after(1000):
            await work()  # type: ignore[operator]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def read(watch: Watch, into: list[Headway], pause: float = 0.0) -> None:
    async for headway in watch:
        into.append(headway)
        await trio.sleep(pause)


def test_the_last_value_is_how_far_all_was_in_the_end() -> None:
    async def work() -> None:
        seen: list[Headway] = []
        async with trio.open_nursery() as nursery:
            with Watch() as watch:
                nursery.start_soon(read, watch, seen)
                for done in range(101):
                    watch(Step.UNPACK, "sha256:a", 100, done)
                    await trio.sleep(0.01)
                watch(Step.DONE, "sha256:a", 100, 100)
        assert seen[-1].parts[0].stage is Stage.DONE
        assert 5 < len(seen) < 20, "at most ten a second"
        amounts = [headway.apply.done for headway in seen]
        assert amounts == sorted(amounts)

    on_a_clock(work)


def test_who_reads_slowly_has_the_latest_and_holds_nobody_up() -> None:
    async def work() -> None:
        seen: list[Headway] = []
        async with trio.open_nursery() as nursery:
            with Watch() as watch:
                nursery.start_soon(read, watch, seen, 50.0)
                await trio.sleep(1)
                for done in range(10_001):
                    watch(Step.UNPACK, "sha256:a", 10_000, done)
                assert len(seen) == 1
                await trio.sleep(60)
        assert seen[1].apply.done == 10_000
        assert len(seen) <= 4

    on_a_clock(work)


def test_two_who_read_and_one_who_comes_late_see_the_same_end() -> None:
    async def work() -> None:
        streams: list[list[Headway]] = [[], [], []]
        async with trio.open_nursery() as nursery:
            with Watch() as watch:
                nursery.start_soon(read, watch, streams[0])
                nursery.start_soon(read, watch, streams[1], 0.7)
                await trio.sleep(1)
                watch(Step.FETCH, "sha256:a", 9, 4)
                await trio.sleep(1)
            nursery.start_soon(read, watch, streams[2])
        assert streams[2] == [watch.headway()]
        assert {stream[-1].fetch.done for stream in streams} == {4}

    on_a_clock(work)


def test_without_news_it_still_tells_that_there_are_none() -> None:
    async def work() -> None:
        seen: list[Headway] = []
        async with trio.open_nursery() as nursery:
            with Watch() as watch:
                nursery.start_soon(read, watch, seen)
                await trio.sleep(10)
        assert 8 <= len(seen) <= 12

    on_a_clock(work)


def test_reports_from_threads() -> None:
    async def work() -> None:
        seen: list[Headway] = []
        with Watch() as watch:

            def told() -> None:
                for done in range(1, 1001):
                    watch(Step.STORE, threading.current_thread().name, 1000, done)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, watch, seen)
                async with trio.open_nursery() as telling:
                    for _ in range(4):
                        telling.start_soon(trio.to_thread.run_sync, told)
                watch.close()
        parts = seen[-1].parts
        assert sum(part.fetch.done for part in parts if part.fetch) == 1000 * len(parts)

    trio.run(work)


def test_a_report_after_its_loop_has_ended() -> None:
    watch = Watch()

    async def work() -> None:
        with trio.move_on_after(0.001):
            async for _ in watch:
                pass
        watch._bell._waiting.append((trio.lowlevel.current_trio_token(), trio.Event()))

    trio.run(work)
    watch(Step.READ, "x", 1, 1)
