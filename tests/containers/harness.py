"""Has engines launch and destroy containers, kills them at random, and looks for what is left.

Sync. An engine dies after so many lines that it told, or at a point of its work (`engine.failpoints`);
never at a time. Those who follow it are told what it told, as a runtime would know it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import open_engine
from engine.failpoints import NAMES
from engine.kv.schema import SNAPSHOTS, TRASH
from engine.mount import deactivate_below
from engine.root import Root
from engine.running.containerizer import open_containerizer
from engine.snapshots import Kind
from tests.command import dump
from tests.containers.actor import IMAGE, course_of, name_of
from tests.inline import workers_inline
from tests.processes import until
from tests.running.images import image
from tests.running.scene import assert_nothing_runs, working_for

__all__ = ["Storm", "assert_no_trace", "storm"]

_POINTS = sorted(name for name in NAMES if name.partition(".")[0] in {"provision", "destroy", "launch"})
_LINES = 60  # at most, between two kills
_MARK = "LAMINA_TEST_STORM"


@dataclass
class Storm:
    """What happened until all containers were gone."""

    seed: str
    destroyed: int = 0
    killed: int = 0
    found: int = 0
    """Containers that ran, or had ended, when a later engine looked."""
    uniques: set[str] = field(default_factory=set)


class _Lane:
    """One engine after another, with containers of their own."""

    def __init__(
        self, root: Path, seed: str, numbers: Collection[int], at_once: int, *, is_alone: bool
    ) -> None:
        self._root = root
        self._is_alone = is_alone
        self._seed = seed
        self._at_once = at_once
        self._source = random.Random(f"{seed} {min(numbers)}")
        self._todo = dict.fromkeys(map(name_of, numbers))
        self._numbers = {name_of(number): number for number in numbers}
        self._launched: set[str] = set()
        self._going: set[str] = set()
        self.storm = Storm(seed)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while self._todo:
                self._engine()
        except BaseException as error:  # noqa: BLE001  raised where the lanes come together
            self.error = error

    def _engine(self) -> None:
        """Have an engine work until it is done, or killed."""
        (lines, point), known = self._moment(), self._known()
        job = {
            "root": str(self._root),
            "seed": self._seed,
            "at_once": self._at_once,
            "numbers": [self._numbers[name] for name in self._todo],
            "begun": [self._numbers[name] for name in self._going & self._todo.keys()],
            "known": known,
            "is_alone": self._is_alone,
            "failpoints": point,
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.containers.actor", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, _MARK: str(self._root), "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert process.stdout
        for count, line in enumerate(process.stdout):
            if line.endswith("\n"):
                self._hear(json.loads(line), known)
            if count == lines:
                process.kill()
        _, messages = process.communicate()
        assert process.returncode in {0, -signal.SIGKILL}, messages
        self.storm.killed += process.returncode != 0
        with suppress(FileNotFoundError):
            self.storm.uniques |= set(os.listdir(self._root / "containers"))

    def _known(self) -> list[str] | None:
        """Return what a runtime knows, half of the time; None for all that there is."""
        if not self._is_alone or self._source.random() < 0.5:
            return None
        return sorted(one for one in self._launched if one.partition("-")[0] not in self._going)

    def _moment(self) -> tuple[int, str]:
        """Return after how many lines the next engine is killed, and at which point, if at one."""
        lines = self._source.randint(0, _LINES)
        if self._source.random() < 0.5:
            return lines, ""
        return lines, f"{self._source.choice(_POINTS)}=kill@{self._source.randint(1, self._at_once)}"

    def _hear(self, line: dict[str, Any], known: list[str] | None) -> None:
        if "recovered" in line:
            self._check(line["recovered"])
            assert known is None or line["recovered"].keys() <= set(known), "nobody knows it"
        elif "launched" in line:
            self._launched.add(line["launched"])
            self.storm.uniques.add(line["unique"])
        elif "destroys" in line:
            self._going.add(line["destroys"])
        elif "destroyed" in line:
            name = line["destroyed"]
            del self._todo[name]
            self._launched -= {name, f"{name}-inner"}
            self.storm.destroyed += 1

    def _check(self, found: dict[str, tuple[str, int | None]]) -> None:
        """Check that what was launched is there, with its exit code, and that nothing is half made."""
        mine = {name: one for name, one in found.items() if name.partition("-")[0] in self._numbers}
        if self._is_alone:  # else those who recover at the same time may be at what was half made
            assert {state for state, _ in mine.values()} <= {"provisioned", "running", "stopped"}, mine
        gone = self._numbers.keys() - self._todo.keys()
        assert not gone & mine.keys(), "what was destroyed is there"
        for name in self._launched:
            if name.partition("-")[0] in self._going:
                continue
            assert name in mine, f"{name} was launched, and is gone"
            state, code = mine[name]
            assert state in {"running", "stopped"}, (name, state)
            course = course_of(self._seed, self._numbers[name]) if name in self._numbers else None
            if course is None:
                assert code in {None, 0}, (name, code)
            elif state == "stopped":
                assert course.then, f"{name} ended by itself, with {code}"
                assert course.code in {None, code}, (name, code)
            self.storm.found += 1


@contextmanager
def store(folder: Path) -> Iterator[Path]:
    """Give a store with an image of busybox, unpacked for each backend."""

    async def bring() -> None:
        async with open_engine(root) as engine:
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await engine.import_image(layout, name=IMAGE, snapshotter="overlay")
                await engine.unpack(IMAGE, snapshotter="copy")

    async def clear() -> None:
        async with open_engine(root) as engine, open_containerizer(engine) as containers:
            await containers.recover([])

    root, layout = folder / "root", image(folder / "layout")
    before = os.umask(0)
    try:
        trio.run(bring)
        yield root
    finally:
        trio.run(clear)  # of a test that failed
        os.umask(before)
        deactivate_below(root)


def storm(root: Path, *, containers: int, at_once: int, seed: str, processes: int = 1) -> Storm:
    """Launch and destroy so many containers, by engines that are killed; check that no trace is left."""
    lanes = [
        _Lane(
            root,
            seed,
            range(start, containers, processes),
            at_once // processes,
            is_alone=processes == 1,
        )
        for start in range(processes)
    ]
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = Storm(seed)
    for lane in lanes:
        if lane.error:
            raise lane.error
        done.destroyed += lane.storm.destroyed
        done.killed += lane.storm.killed
        done.found += lane.storm.found
        done.uniques |= lane.storm.uniques
    assert_no_trace(root, done.uniques)
    return done


def assert_no_trace(root: Path, uniques: Collection[str]) -> None:
    """Check that of containers nothing is left: no record, folder, mount, cgroup or process."""

    async def collected() -> None:
        async with open_engine(root) as engine:
            await engine.collect()  # which takes the leases of the dead

    trio.run(collected)
    until(lambda: not working_for(root))  # one that was killed may be on its way out still
    assert_nothing_runs(root, uniques)
    until(lambda: not _marked(root, uniques))
    with Root(root) as opened, opened.meta.read() as txn:
        assert not TRASH.any(txn)
        kinds = {record.kind for _, record in SNAPSHOTS.entries(txn) if record}
    assert kinds == {Kind.COMMITTED}
    left = dump(root)
    assert len(left["folders"]) == len(left["snapshots"]), left["folders"]


def _marked(root: Path, uniques: Collection[str]) -> list[str]:
    """Return the processes that engines of a store have started, and what runs in its containers."""
    mark = f"{_MARK}={root}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            words = (entry / "environ").read_bytes().split(b"\0")
            groups = (entry / "cgroup").read_text()
            if mark in words or any(unique in groups for unique in uniques):
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
    return found
