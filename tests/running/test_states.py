"""Containers by their states: what follows what, who waits for whom, and what a failure leaves."""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from engine import failpoints
from engine.errors import AlreadyExists, CommandFailed, EngineError, FailedPrecondition, NotFound
from engine.labels import EPHEMERAL
from engine.metadata.containers import TRANSITIONS, ContainerState, ContainerStore
from engine.observing.metering import Verb
from engine.observing.metrics import exposition
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.options import RunOptions
from engine.running.statuses import Ended, Launched
from tests.running.scene import IMAGE, Floor, Scene

pytestmark = pytest.mark.root


def test_mc_01_02_08_a_container_goes_through_its_states(scene: Scene) -> None:
    """In order, each with its time, and what it runs is written down before."""

    async def work(floor: Floor) -> None:
        launched = await floor.launch("one", "sleep", "1000")
        assert not launched.already
        status = launched.status
        assert (status.state, status.command) == ("running", ["sleep", "1000"])
        assert status.image == f"docker.io/library/{IMAGE}"
        assert status.pid > 0
        assert list(status.since) == ["provisioning", "provisioned", "preparing", "starting", "running"]
        assert list(status.since.values()) == sorted(status.since.values())
        again = await floor.launch("one", "sleep", "1000")
        assert again.already
        with pytest.raises(AlreadyExists, match="other options"):
            await floor.launch("one", "true")
        assert again.status == status

        assert [one.id for one in await floor.containers.walk()] == ["one"]
        assert await floor.containers.destroy("one")
        assert not await floor.containers.destroy("one")
        with pytest.raises(NotFound):
            await floor.containers.status("one")
        with pytest.raises(NotFound):
            await floor.containers.wait("one")

    scene.run(work)


def test_mc_02_no_other_state_follows(scene: Scene) -> None:
    """What is not in the table is refused, and nothing changes."""

    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        store = ContainerStore(floor.stores.root.meta, floor.stores.namespace)
        record = store.get("one")
        for state in set(ContainerState) - TRANSITIONS[ContainerState.RUNNING]:
            with pytest.raises(FailedPrecondition, match="cannot become"):
                store.move(record, state)
        assert store.get("one") == record

    scene.run(work)


def test_mc_03_destroyed_while_it_is_provisioned(scene: Scene) -> None:
    """What was made goes, and the launch says what happened."""
    reached, go_on = trio.Event(), trio.Event()

    async def work(floor: Floor) -> None:
        async def gate() -> None:
            reached.set()
            await go_on.wait()

        async with trio.open_nursery() as nursery:
            floor.gates.append(gate)
            nursery.start_soon(_removed_meanwhile, partial(floor.launch, "one", "true"))
            await reached.wait()
            assert (await floor.containers.status("one")).state == "provisioning"
            assert await floor.containers.destroy("one")
            go_on.set()
        assert not floor.exists("one")

    scene.run(work, unpacks=False)


async def _removed_meanwhile(launching: Callable[[], Any]) -> None:
    with pytest.raises(FailedPrecondition, match="was removed while it was being made"):
        await launching()


@pytest.mark.parametrize("state", ["preparing", "starting"])
def test_mc_04_destroyed_while_it_starts(
    scene: Scene, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being prepared or started is let end before anything is taken from under it."""

    async def work(floor: Floor) -> None:
        gate = floor.held(monkeypatch, state)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_removed_meanwhile, partial(floor.launch, "one", "sleep", "1000"))
            await gate.reached.wait()
            rootfs = floor.folder("one") / "rootfs" / "bin"
            destroyed = trio.Event()

            async def destroy() -> None:
                assert await floor.containers.destroy("one")
                destroyed.set()

            nursery.start_soon(destroy)
            await floor.becomes("one", "destroying")
            for _ in range(50):
                await trio.sleep(0.001)
                assert rootfs.exists()
            assert not destroyed.is_set()
            gate.open.set()
        assert destroyed.is_set()
        assert not floor.exists("one")

    scene.run(work)


def test_mc_05_who_destroys_the_same_waits_for_the_same(scene: Scene) -> None:
    """All get one answer, and none who leaves takes it from the others."""

    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        answers: list[bool] = []

        async def destroy() -> None:
            answers.append(await floor.containers.destroy("one"))

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(destroy)
                nursery.start_soon(destroy)
                scope.cancel()
                await floor.containers.destroy("one")
        assert answers == [True, True]

        await floor.launch("two", "sleep", "1000")
        with trio.CancelScope() as scope:
            scope.cancel()
            await floor.containers.destroy("two")
        await floor.goes("two")

    scene.run(work)


def test_mc_06_children_go_first(scene: Scene) -> None:
    """A parent whose child cannot be removed stays, says why, and is removed when asked again."""

    async def work(floor: Floor) -> None:
        containers = floor.containers
        await floor.launch("above", "sleep", "1000")
        await floor.launch("below", "sleep", "1000", parent="above")
        await floor.launch("deep", "sleep", "1000", parent="below")
        with (
            failpoints.armed("destroy.killed", "error"),
            pytest.raises(EngineError, match="failpoint"),
        ):
            await containers.destroy("above")
        for one in ("above", "below", "deep"):
            status = await containers.status(one)
            assert (status.state, status.errors) == ("destroying", 1)
            assert "failpoint" in status.error
        with pytest.raises(FailedPrecondition, match="being removed"):
            await floor.launch("late", "true", parent="above")
        assert floor.engine.statistics().calls[Verb.DESTROY].results["EngineError"] == 1
        assert await containers.destroy("above")
        assert await containers.walk() == []

    scene.run(work)


@pytest.mark.parametrize("where", ["destroy.killed", "destroy.deleted"])
def test_mc_07_what_cannot_be_destroyed_stays_in_sight(scene: Scene, where: str) -> None:
    """Each step after the one before; a failure ends it, is counted, and is tried again."""

    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        for times in (1, 2):
            with failpoints.armed(where, "error"), pytest.raises(EngineError, match=where):
                await floor.containers.destroy("one")
            status = await floor.containers.status("one")
            assert (status.state, status.errors) == ("destroying", times)
            assert where in status.error
            assert (floor.folder("one") / "rootfs" / "bin").exists(), "its root went before its end"
        with pytest.raises(FailedPrecondition, match="being removed"):
            await floor.launch("one", "sleep", "1000")
        assert await floor.containers.destroy("one")

    scene.run(work)


def test_mc_09_ms_35_prune_leaves_what_containers_use(scene: Scene) -> None:
    """Whatever the tag means by now, its image stays until the container goes."""

    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        await floor.engine.remove_image(IMAGE)
        await floor.containers.prune()
        status = await floor.containers.status("one")
        assert status.state == "running"
        assert floor.has_content(status.target)
        await floor.containers.destroy("one")
        await floor.containers.prune()
        assert not floor.has_content(status.target)

    scene.run(work)


def test_mc_11_status_is_told_in_order(scene: Scene) -> None:
    """Of many who ask, who asked first is answered first, and none sees time run backwards."""

    async def work(floor: Floor) -> None:
        told: list[tuple[int, Any]] = []

        async def ask(number: int) -> None:
            told.append((number, await floor.containers.status("one")))

        await floor.launch("one", "sleep", "0.2")
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, number)
                await trio.sleep(0.005)
        assert [number for number, _ in told] == list(range(100))
        states = [status.state for _, status in told]
        assert states == sorted(states, key=["running", "stopped"].index)

    scene.run(work)


def test_all_who_wait_are_told(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        ends: list[Ended] = []

        async def wait() -> None:
            ends.append(await floor.containers.wait("one"))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.sleep(0.01)
            await floor.containers.destroy("one")
        assert [one.code for one in ends] == [137] * 3

    scene.run(work)


def test_a_cancelled_launch_leaves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(floor: Floor) -> None:
        for state in ("preparing", "starting"):
            gate = floor.held(monkeypatch, state)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(floor.launch, "one", "sleep", "1000")
                await gate.reached.wait()
                nursery.cancel_scope.cancel()
                gate.open.set()
            assert not floor.exists("one")

    scene.run(work)


def test_counted(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")
        await floor.launch("two", "true")
        await floor.containers.wait("two")
        found = await floor.containers.statistics()
        assert found.containers["running"] == 1
        assert found.containers["stopped"] == 1
        assert found.calls[Verb.LAUNCH].results == {"ok": 2}
        assert 'state="running"} 1' in exposition(found)

    scene.run(work)


def test_mc_01_two_launch_the_same(scene: Scene) -> None:
    """All who launch one ID at once get the one container, and one of them made it."""

    async def work(floor: Floor) -> None:
        found: list[Launched] = []

        async def launch(by: Containerizer) -> None:
            options = RunOptions(args=["sleep", "1000"])
            found.append(await by.launch("one", IMAGE, options, snapshotter=scene.backend))

        async with open_containerizer(floor.engine) as other, trio.open_nursery() as nursery:
            for by in (floor.containers, other, floor.containers, other):
                nursery.start_soon(launch, by)
        assert sorted(one.already for one in found) == [False, True, True, True]
        assert len({one.status.unique for one in found}) == 1
        floor.note("one")

    scene.run(work)


def test_mc_12_the_ephemeral_do_not_outlive_a_restart(scene: Scene) -> None:
    """Whoever knows of them."""

    async def work(floor: Floor) -> None:
        await floor.launch("debug", "sleep", "1000", labels={EPHEMERAL: "yes"})
        await floor.launch("other", "sleep", "1000")
        recovered = await floor.containers.recover(["debug", "other"])
        assert (recovered.destroyed, recovered.running) == (["debug"], ["other"])

    scene.run(work)


def test_mc_13_files_are_deleted_later_where_they_resist(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container wrote is out of the way at once, and deleted by whoever comes next."""

    async def work(floor: Floor) -> None:
        await floor.launch("one", "sh", "-c", "echo x > /file")
        await floor.containers.wait("one")
        backend = floor.stores.snapshotter(scene.backend)
        with monkeypatch.context() as patched:
            patched.setattr(type(backend), "cleanup", lambda *_args, **_options: [])
            assert await floor.containers.destroy("one")
        folders = floor.stores.root.snapshots / scene.backend
        before = len(os.listdir(folders))
        await floor.engine.collect()
        assert len(os.listdir(folders)) == before - 1

    scene.run(work)


def test_mc_14_no_descriptor_stays_open(scene: Scene) -> None:
    """Whatever became of a container, nothing of it is open in the engine."""

    async def work(floor: Floor) -> None:
        async def once(number: int) -> None:
            await floor.launch(f"c{number}", "sleep", "1000")
            with trio.move_on_after(0.02):
                await floor.containers.wait(f"c{number}")
            await floor.containers.kill(f"c{number}")
            await floor.containers.wait(f"c{number}")
            await floor.containers.destroy(f"c{number}")
            with pytest.raises(CommandFailed):
                await floor.launch(f"d{number}", "/none")

        await once(0)
        before = sorted(_open_files())
        for number in range(1, 4):
            await once(number)
        assert sorted(_open_files()) == before

    scene.run(work)


def _open_files() -> list[str]:
    with os.scandir("/proc/self/fd") as entries:
        names = [os.readlink(entry.path) for entry in entries if os.path.lexists(entry.path)]
    return [re.sub(r"[0-9]+", "N", name) for name in names if "/proc/" not in name]


def test_mc_15_what_grows_with_writes_is_measured(each: Scene) -> None:
    """What a container writes counts as its own, before and after a restart."""

    async def write(floor: Floor) -> None:
        await floor.launch("one", "sh", "-c", "dd if=/dev/zero of=/file bs=1k count=512; sleep 1000")
        await floor.writes("one", b"512+0 records out")

    async def measure(floor: Floor) -> None:
        usage = await floor.containers.usage("one")
        assert usage.disk["/"].size >= 512 << 10

    each.run(write)
    each.run(measure, imports=False)
