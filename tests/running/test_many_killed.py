"""Many containers at once, and an engine that is killed at random among them: nothing is left of any."""

import random
import signal
import subprocess
import sys

import pytest

from tests.running.scene import IMAGE, Floor, Scene

pytestmark = [pytest.mark.root, pytest.mark.crash]

_CHILD = """
import sys
import trio
from engine.app import open_engine
from engine.running.containerizer import open_containerizer
from engine.running.options import RunOptions

SCRIPTS = ["exit 3", "sleep 0.02; exit 3", "sleep 1000"]

async def main(root, backend, image, prefix):
    async with open_engine(root) as engine, open_containerizer(engine) as containers:
        recovered = await containers.recover()
        assert not recovered.failed, recovered
        places = trio.CapacityLimiter(20)

        async def one(number):
            name = f"{prefix}-{number}"
            async with places:
                options = RunOptions(args=["sh", "-c", SCRIPTS[number % 3]])
                launched = await containers.launch(name, image, options, snapshotter=backend)
                print(launched.status.unique, flush=True)
                if number % 3 < 2:
                    assert (await containers.wait(name)).code == 3
                await containers.destroy(name)
                print(flush=True)

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)

trio.run(main, *sys.argv[1:])
"""


async def nothing(_floor: Floor) -> None:
    """Only import the image."""


def run(scene: Scene, prefix: str, lines: int) -> None:
    """Run 200 containers, 20 at a time; kill the engine once it has said so many lines."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, scene.root, scene.backend, IMAGE, prefix],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line, _ in zip(child.stdout, range(lines), strict=False):
        scene.uniques.update(line.split())
    if lines < 400:
        child.kill()
    out, errors = child.communicate(timeout=60)
    scene.uniques.update(out.split())
    assert child.returncode == (-signal.SIGKILL if lines < 400 else 0), errors


@pytest.mark.parametrize("seed", range(3))
def test_mc_10_e_05_killed_among_many(scene: Scene, seed: int) -> None:
    """Neither mount nor process, cgroup, folder or record."""
    moments = random.Random(seed)

    async def then(floor: Floor) -> None:
        there = {one.id for one in await floor.containers.walk()}
        for name in there:
            floor.note(name)
        recovered = await floor.containers.recover([])
        assert not recovered.failed
        assert set(recovered.destroyed) == there

    scene.run(nothing)
    for number in range(4):
        run(scene, f"k{number}", moments.randrange(1, 60))
    scene.run(then, imports=False)


def test_mc_10_e_05_two_hundred(scene: Scene) -> None:
    scene.run(nothing)
    run(scene, "all", 400)
    assert len(scene.uniques) == 200
