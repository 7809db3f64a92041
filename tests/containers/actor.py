"""An engine that launches containers and destroys them, many at a time, until it is done or killed.

Async. Each container has a course, by its number: what runs in it, how that ends, with which code. What
another engine has begun is gone on with. All is told in lines of standard output, before and after.
"""

import json
import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from engine import failpoints
from engine.app import open_engine
from engine.errors import CommandFailed, FailedPrecondition
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.options import RunOptions

__all__ = ["COURSES", "Course", "course_of", "name_of"]

IMAGE = "image:latest"
KILLED = 137


@dataclass(frozen=True)
class Course:
    """What becomes of a container before it is destroyed."""

    args: Sequence[str]
    then: str = "wait"
    """What is done to it once it was launched; "" for nothing."""
    code: int | None = None
    """How it ends, whoever looks; None if it does not by itself."""
    is_nested: bool = False
    """Whether another runs in it, which is not destroyed by itself."""


COURSES = (
    Course(("true",), code=0),
    Course(("sh", "-c", "echo text > /file; exit 7"), code=7),
    Course(("sleep", "1000"), then="kill", code=KILLED),
    Course(("sh", "-c", "trap 'exit 3' TERM; sleep 1000 & wait"), then="stop"),
    Course(("sleep", "1000"), then=""),
    Course(("sleep", "1000"), then="", is_nested=True),
    Course(("nothing-of-that-name",), then="fails"),
)


def course_of(seed: str, number: int) -> Course:
    """Return the course of a container."""
    return random.Random(f"{seed} {number}").choice(COURSES)


def name_of(number: int) -> str:
    """Return the ID of a container."""
    return f"c{number}"


def _tell(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class _Actor:
    def __init__(self, containers: Containerizer, job: dict[str, Any]) -> None:
        self._containers = containers
        self._job = job

    async def run(self) -> None:
        recovered = await self._containers.recover(self._job["known"])
        if self._job["is_alone"]:
            assert not recovered.failed, recovered
        found = {one.id: (str(one.state), one.exit_code) for one in await self._containers.walk()}
        _tell(recovered=found)
        limiter = trio.CapacityLimiter(self._job["at_once"])
        async with trio.open_nursery() as nursery:
            for number in self._job["numbers"]:
                nursery.start_soon(self._course, number, limiter)

    async def _course(self, number: int, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            course, name = course_of(self._job["seed"], number), name_of(number)
            if course.then == "fails":
                await self._fails(name, course)
            elif number not in self._job["begun"]:
                await self._launch(name, course)
                if course.is_nested:
                    await self._launch(f"{name}-inner", COURSES[0], parent=name)
                if course.then:
                    await self._end(name, course)
            _tell(destroys=name)
            await self._containers.destroy(name)
            _tell(destroyed=name)

    async def _launch(self, name: str, course: Course, **options: Any) -> None:
        source = random.Random(f"{self._job['seed']} {name}")
        launched = await self._containers.launch(
            name,
            IMAGE,
            RunOptions(args=course.args),
            snapshotter=source.choice(["overlay", "overlay", "copy"]),
            **options,
        )
        _tell(launched=name, unique=launched.status.unique, already=launched.already)

    async def _fails(self, name: str, course: Course) -> None:
        with suppress(CommandFailed):
            await self._launch(name, course)
            raise AssertionError(f"{name} was launched")

    async def _end(self, name: str, course: Course) -> None:
        with suppress(FailedPrecondition):  # an engine that was killed had just ended it
            if course.then == "kill":
                await self._containers.kill(name)
            elif course.then == "stop":
                await self._containers.stop(name)
        ended = await self._containers.wait(name)
        assert course.code in {None, ended.code}, (name, course, ended)
        _tell(ended=name, code=ended.code)


async def _main(job: dict[str, Any]) -> None:
    async with open_engine(Path(job["root"])) as engine, open_containerizer(engine) as containers:
        failpoints.arm(job["failpoints"])
        await _Actor(containers, job).run()


if __name__ == "__main__":
    trio.run(_main, json.loads(sys.argv[1]))
