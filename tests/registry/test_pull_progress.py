"""How far a pull is: for each who wants it, however late he comes, and wherever the work is done."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import trio
import trio.testing

from engine.app import Engine
from engine.errors import Unavailable
from engine.kv.schema import EXTENT
from engine.observing.watching import Watch
from engine.progress import Headway, Stage, Step
from engine.registry.client import Client, open_client
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, cut
from tests.command import lamina_json
from tests.registry.asking import Served
from tests.registry.pulls import Held, access, engine_at

pytestmark = pytest.mark.root


@pytest.fixture
def running(
    tmp_path: Path, umask_0: None
) -> Callable[[Callable[[Engine, Client], Awaitable[None]]], None]:
    def run(work: Callable[[Engine, Client], Awaitable[None]]) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                async with engine_at(tmp_path / "root") as engine, open_client(access()) as client:
                    await work(engine, client)

        trio.run(main)

    return run


async def until(watch: Watch, condition: Callable[[Headway], object]) -> Headway:
    async for headway in watch:
        if condition(headway):
            return headway
    raise AssertionError("it never was so")


def sizes(served: Served) -> list[tuple[str, int]]:
    return [(layer.digest, layer.size) for layer in served.layers]


def test_a_pull_from_its_plan_to_its_end(running: Any, served: Served) -> None:
    async def work(engine: Engine, client: Client) -> None:
        for found in (False, True):
            stages: dict[str, list[Stage]] = {}
            watch = Watch()

            def told(*report: Any, watch: Watch = watch, stages: Any = stages) -> None:
                watch(*report)
                for part in watch.headway().parts:
                    seen = stages.setdefault(part.digest, [])
                    if part.stage not in seen[-1:]:
                        seen.append(part.stage)

            await engine.pull(str(served.reference), client, snapshotter="overlay", report=told)
            headway = watch.headway()
            assert [(part.digest, part.fetch.total) for part in headway.parts if part.fetch] == sizes(
                served
            )
            assert headway.done == 2
            whole = sum(size for _, size in sizes(served))
            for amount in (headway.fetch, headway.apply):
                assert (amount.done, amount.total) == (whole, whole)
                assert amount.found == (whole if found else 0)
            assert headway.remaining == 0.0
            assert not headway.waits
            assert not headway.tasks
            big = stages[served.layers[1].digest]
            assert big[-1] is Stage.DONE
            assert found or [stage for stage in big if stage is not Stage.WAITING][:1] == [
                Stage.FETCHING
            ]

    running(work)


def test_without_unpacking_it_is_done_when_it_is_stored(running: Any, served: Served) -> None:
    async def work(engine: Engine, client: Client) -> None:
        watch = Watch()
        await engine.pull(str(served.reference), client, report=watch)
        headway = watch.headway()
        assert [part.stage for part in headway.parts] == [Stage.DONE] * 2
        assert not headway.apply.total

    running(work)


def test_what_an_attempt_that_broke_off_left_was_found(
    running: Any, served: Served, registry: FakeRegistry
) -> None:
    async def work(engine: Engine, client: Client) -> None:
        big = served.layers[1]
        registry.plan(f"blobs/{big.digest}", cut(EXTENT + 100))
        registry.plan(f"blobs/{big.digest}", cut(0), times=5)
        with pytest.raises(Unavailable):
            await engine.pull(str(served.reference), client)
        watch = Watch()
        registry._planned.clear()
        await engine.pull(str(served.reference), client, report=watch)
        (fetch,) = [part.fetch for part in watch.headway().parts if part.digest == big.digest]
        assert fetch
        assert (fetch.done, fetch.found) == (big.size, EXTENT + 100)

    running(work)


def half(held: Held) -> Fault:
    """Send the first extent and a bit; the rest when the test says so."""

    def fault(connection: socket, _asked: Asked, good: bytes) -> bool:
        head = good.index(b"\r\n\r\n") + 4 + EXTENT + 100
        connection.sendall(good[:head])
        held.came.set()
        held.go_on.wait(30)
        connection.sendall(good[head:])
        return True

    return fault


def test_who_joins_late_sees_where_all_is_and_the_same_end(
    running: Any, served: Served, registry: FakeRegistry, held: Held
) -> None:
    async def work(engine: Engine, client: Client) -> None:
        registry.plan(f"blobs/{served.layers[1].digest}", half(held))
        first, late = Watch(), Watch()

        async def pull(watch: Watch) -> None:
            await engine.pull(str(served.reference), client, snapshotter="overlay", report=watch)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, first)
            small = served.layers[0].digest
            await until(
                first,
                lambda now: (
                    now.fetch.done > EXTENT
                    and now.parts[0].digest == small
                    and now.parts[0].stage is Stage.DONE
                ),
            )
            nursery.start_soon(pull, late)
            seen = await until(late, lambda now: now.callers == 2)
            assert [part.digest for part in seen.parts] == [layer.digest for layer in served.layers]
            assert [part.stage for part in seen.parts] == [Stage.DONE, Stage.FETCHING]
            assert seen.fetch.done > EXTENT
            assert first.headway().callers == 2
            held.go_on.set()
        for watch in (first, late):
            assert watch.headway().done == 2
            assert watch.headway().fetch.remaining == 0.0

    running(work)


def test_who_waits_for_the_blob_of_another_pull_sees_it_come(
    running: Any, served: Served, registry: FakeRegistry, held: Held
) -> None:
    """Whoever fetches it may be another process: it is seen by what is durable."""

    async def work(engine: Engine, client: Client) -> None:
        big = served.layers[1]
        registry.plan(f"blobs/{big.digest}", half(held))
        watch = Watch()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.pull, str(served.reference), client)
            await trio.to_thread.run_sync(held.came.wait)

            async def other() -> None:  # it wants something else, so that the pulls are two
                await engine.pull(str(served.reference), client, snapshotter="overlay", report=watch)

            nursery.start_soon(other)

            def waits(headway: Headway) -> bool:
                return any(part.waits_for is Step.OTHER for part in headway.parts)

            seen = await until(watch, lambda now: waits(now) and now.waits)
            (part,) = [part for part in seen.parts if part.digest == big.digest]
            assert part.stage in {Stage.WAITING, Stage.FETCHING}
            held.go_on.set()
        headway = watch.headway()
        assert headway.done == 2
        assert headway.parts[1].fetch
        assert headway.parts[1].fetch.found == big.size, "another fetched it"
        assert not headway.waits

    running(work)


def test_a_command_tells_all_phases(tmp_path: Path, served: Served) -> None:
    words = ("pull", "--platform", "linux/amd64", "--snapshotter", "overlay", str(served.reference))
    timings = lamina_json(tmp_path / "root", *words)["timings"]
    assert list(timings) == ["fetch", "inflate", "hash", "write", "commit", "flush"]
    assert all(spent["busy"] > 0 for spent in timings.values())
    assert timings["fetch"]["waiting"] > 0
