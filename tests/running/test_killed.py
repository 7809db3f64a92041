"""An engine that is killed leaves containers that run and are found again, or nothing."""

import os
import signal
import subprocess
import sys

import pytest
import trio

from engine.running import cgroups
from tests.processes import until
from tests.provision.scene import reboot
from tests.running.scene import IMAGE, Floor, Scene

pytestmark = [pytest.mark.root, pytest.mark.crash]

_CHILD = """
import sys
import trio
from engine import failpoints
from engine.app import open_engine
from engine.running.containerizer import open_containerizer
from engine.running.options import RunOptions

async def main(root, backend, image, verb, terms):
    async with open_engine(root) as engine, open_containerizer(engine) as containers:
        if verb == "launch":
            failpoints.arm(terms)
            options = RunOptions(args=("sleep", "1000"))
            await containers.launch("one", image, options, snapshotter=backend)
        else:
            failpoints.arm(terms)
            await containers.destroy("one")

trio.run(main, *sys.argv[1:])
"""

BEFORE = (
    "provision.recorded",
    "provision.mounted",
    "launch.preparing",
    "launch.prepared",
    "launch.starting",
)
AFTER = ("launch.started",)
DESTROYING = ("destroy.recorded", "destroy.killed", "destroy.deleted", "destroy.discarded")


def killed(scene: Scene, verb: str, where: str) -> None:
    words = [scene.root, scene.backend, IMAGE, verb, f"{where}=kill"]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


async def nothing(_floor: Floor) -> None:
    """Only import the image."""


@pytest.mark.parametrize("where", BEFORE)
@pytest.mark.parametrize("known", [True, False])
def test_mc_10_12_killed_before_the_process(each: Scene, where: str, known: bool) -> None:
    """What was half made goes, whoever knows of it; and can be launched at once."""

    async def work(floor: Floor) -> None:
        floor.note("one")
        recovered = await floor.containers.recover(["one"] if known else None)
        assert (recovered.destroyed, recovered.failed) == (["one"], [])
        assert not floor.exists("one")
        await floor.launch("one", "sleep", "1000")

    each.run(nothing)
    killed(each, "launch", where)
    each.run(work, imports=False)


def test_killed_between_provisioning_and_the_rest(scene: Scene) -> None:
    """What is there is whole, and a launch goes on from there."""

    async def work(floor: Floor) -> None:
        recovered = await floor.containers.recover(["one"])
        assert (recovered.provisioned, recovered.destroyed) == (["one"], [])
        unique = floor.record("one").unique
        launched = await floor.launch("one", "sleep", "1000")
        assert (launched.already, launched.status.unique) == (False, unique)

    scene.run(nothing)
    killed(scene, "launch", "provision.settled")
    scene.run(work, imports=False)


@pytest.mark.parametrize("where", BEFORE)
def test_launched_again_where_the_first_was_killed(scene: Scene, where: str) -> None:
    async def work(floor: Floor) -> None:
        floor.note("one")
        assert not (await floor.launch("one", "sleep", "1000")).already

    scene.run(nothing)
    killed(scene, "launch", where)
    scene.run(work, imports=False)


@pytest.mark.parametrize("where", AFTER)
def test_mc_10_killed_when_it_runs(each: Scene, where: str) -> None:
    """It runs on, and is found again."""

    async def work(floor: Floor) -> None:
        floor.note("one")
        assert (await floor.containers.recover(["one"])).running == ["one"]
        status = await floor.containers.status("one")
        assert status.state == "running"
        os.kill(status.pid, 0)
        assert (await floor.launch("one", "sleep", "1000")).already
        await floor.containers.kill("one")
        assert (await floor.containers.wait("one")).code == 137

    each.run(nothing)
    killed(each, "launch", where)
    each.run(work, imports=False)


@pytest.mark.parametrize("where", DESTROYING)
def test_mc_07_killed_while_it_destroys(each: Scene, where: str) -> None:
    """Whoever comes next ends what was begun."""

    async def first(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000")

    async def then(floor: Floor) -> None:
        assert (await floor.containers.status("one")).state == "destroying"
        assert (await floor.containers.recover(["one"])).destroyed == ["one"]
        assert not floor.exists("one")

    each.run(first)
    killed(each, "destroy", where)
    each.run(then, imports=False)


def test_mc_10_an_end_outlives_every_engine(scene: Scene) -> None:
    """How it ended is told after any number of restarts, and no monitor is left."""

    async def first(floor: Floor) -> None:
        await floor.launch("one", "sh", "-c", "sleep 0.1; exit 9")

    async def then(floor: Floor) -> None:
        assert (await floor.containers.wait("one")).code == 9
        assert (await floor.containers.status("one")).exit_code == 9

    scene.run(first)
    scene.run(then, imports=False)
    scene.run(then, imports=False)


def test_nobody_saw_the_end(scene: Scene) -> None:
    """Of one whose monitor was killed too it is said that its end is not known."""

    async def work(floor: Floor) -> None:
        launched = await floor.launch("one", "sleep", "1000")
        floor.kill_monitor("one")
        status = await floor.containers.status("one")
        assert (status.state, status.pid) == ("running", launched.status.pid)
        await floor.containers.kill("one")
        assert (await floor.containers.wait("one")).code is None
        status = await floor.containers.status("one")
        assert (status.state, status.exit_code) == ("stopped", None)

    scene.run(work)


def test_mc_10_orphans_go_children_first(scene: Scene) -> None:
    """Of what nobody knows of any more the children go first; the known stay."""

    async def first(floor: Floor) -> None:
        await floor.launch("known", "sleep", "1000")
        await floor.launch("above", "sleep", "1000")
        await floor.launch("below", "sleep", "1000", parent="above")

    async def then(floor: Floor) -> None:
        recovered = await floor.containers.recover(["known"])
        assert list(recovered.running) == ["known"]
        assert sorted(recovered.destroyed) == ["above", "below"]
        assert [one.id for one in await floor.containers.walk()] == ["known"]

    scene.run(first)
    scene.run(then, imports=False)


def test_mc_04_another_process_is_at_it(scene: Scene) -> None:
    """What another process prepares is let end, or that process, before it is taken away."""

    async def work(floor: Floor) -> None:
        words = [scene.root, scene.backend, IMAGE, "launch", "launch.prepared=stop"]
        other = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", _CHILD, *map(str, words)], stderr=subprocess.PIPE
        )
        try:
            await floor.appears("one")
            await floor.becomes("one", "preparing")
            floor.note("one")
            config = floor.folder("one") / "config.json"
            until(config.exists)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(floor.containers.destroy, "one")
                await floor.becomes("one", "destroying")
                for _ in range(20):
                    await trio.sleep(0.005)
                    assert config.exists()
                other.kill()
            assert not floor.exists("one")
        finally:
            other.kill()
            other.communicate()

    scene.run(work)


_OTHER = """
import sys
import trio
from engine.app import open_engine
from engine.running.containerizer import open_containerizer
from engine.running.options import RunOptions

async def main(root, backend, image):
    async with open_engine(root) as engine, open_containerizer(engine) as containers:
        await containers.launch("one", image, RunOptions(args=("sleep", "1000")), snapshotter=backend)
        print("launched", flush=True)
        print((await containers.wait("one")).code, flush=True)
        print("waits", flush=True)
        sys.stdin.read()

trio.run(main, *sys.argv[1:])
"""


def test_two_engines_on_one_root(scene: Scene) -> None:
    """What one process launches another waits for, signals and removes; both are told the end."""

    async def work(floor: Floor) -> None:
        other = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", _OTHER, scene.root, scene.backend, IMAGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "launched\n"
            floor.note("one")
            assert (await floor.launch("one", "sleep", "1000")).already
            await floor.containers.kill("one")
            assert (await floor.containers.wait("one")).code == 137
            assert other.stdout.readline() == "137\n"
            assert await floor.containers.destroy("one")
        finally:
            other.communicate("")
        assert other.returncode == 0
        assert not floor.exists("one")

    scene.run(work)


def test_mc_10_bk_16_after_a_reboot(each: Scene) -> None:
    """Nothing runs and nothing is mounted; what it wrote is there, and its end unknown."""

    async def first(floor: Floor) -> None:
        await floor.launch("one", "sh", "-c", "echo mine > /file; echo done; sleep 1000")
        await floor.launch("ended", "sh", "-c", "exit 4")
        await floor.launch("below", "sleep", "1000", parent="one")
        await floor.writes("one", b"done")
        await floor.containers.wait("ended")

    async def then(floor: Floor) -> None:
        recovered = await floor.containers.recover(["one", "ended", "below"])
        assert sorted(recovered.stopped) == ["below", "ended", "one"]
        assert (recovered.running, recovered.destroyed, recovered.failed) == ([], [], [])
        codes = {one.id: one.exit_code for one in await floor.containers.walk()}
        assert codes == {"one": None, "ended": 4, "below": None}
        assert (floor.folder("one") / "rootfs" / "file").read_text() == "mine\n"

    async def last(floor: Floor) -> None:
        recovered = await floor.containers.recover([])
        assert sorted(recovered.destroyed) == ["below", "ended", "one"]

    def down(floor: Floor) -> None:
        for record in floor.stores.containers.walk():
            if record.pid:
                floor.kill_monitor(record.id)
            cgroups.remove(record.unique)
        reboot(floor.stores)

    async def power(floor: Floor) -> None:
        await trio.to_thread.run_sync(down, floor)

    each.run(first)
    each.run(power, imports=False)
    each.run(then, imports=False)
    each.run(power, imports=False)
    each.run(last, imports=False)
