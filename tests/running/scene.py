"""An engine and its containers, for tests that run them; what they leave is looked for everywhere."""

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.kv.schema import BLOBS, CONTAINERS, LEASES, MOUNTS, Container
from engine.root import Root
from engine.running.containerizer import Containerizer, open_containerizer
from engine.running.options import RunOptions
from engine.running.statuses import Launched
from engine.stores import Stores
from tests.conftest import peer
from tests.inline import workers_inline
from tests.processes import until
from tests.running.images import image

__all__ = ["IMAGE", "Floor", "Scene", "assert_nothing_runs", "mounted_below", "scene", "working_for"]

IMAGE = "image:latest"
CGROUPS = Path("/sys/fs/cgroup")


class Gate:
    """A place where a thread waits until it is let on."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self.reached = trio.Event()
        self.open = threading.Event()

    def wait(self) -> None:
        """Wait in a thread; once it is open, for ever."""
        self._token.run_sync_soon(self.reached.set)
        assert self.open.wait(20)


@dataclass
class Floor:
    """What a test works with while an engine is open."""

    scene: "Scene"
    engine: Engine
    containers: Containerizer
    gates: list[Callable[[], Any]]
    """What each job of a worker has to pass first."""

    @property
    def stores(self) -> Stores:
        return self.engine.stores

    async def bring(self, layout: Path, name: str = IMAGE, *, unpacks: bool = True) -> str:
        """Import an image, and unpack it; return its name."""
        backend = self.scene.backend if unpacks else None
        await self.engine.import_image(layout, name=name, snapshotter=backend)
        return name

    async def launch(self, container: str, *args: str, **options: Any) -> Launched:
        """Run a command in a container of the image."""
        apart = {"image", "parent", "volumes", "keep", "attached", "client", "report"}
        about = {key: value for key, value in options.items() if key in apart}
        rest = {key: value for key, value in options.items() if key not in apart}
        launched = await self.containers.launch(
            container,
            about.pop("image", IMAGE),
            RunOptions(args=args, **rest),
            snapshotter=self.scene.backend,
            **about,
        )
        self.scene.uniques.add(launched.status.unique)
        return launched

    async def output(self, container: str) -> bytes:
        """Return what a container wrote, once it has ended."""
        await self.containers.wait(container)
        return self.written(container)

    def written(self, container: str) -> bytes:
        """Return what a container has written to standard output and error, without the log's marks."""
        record = self.record(container)
        log = self.stores.root.path / "containers" / record.unique / "log"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        parts = (line.split(b" ", 3) for line in lines)  # CRI: time, stream, F or P, text
        return b"".join(text if mark == b"F" else text[:-1] for _, _, mark, text in parts)

    async def writes(self, container: str, what: bytes) -> None:
        """Wait until a container has written something."""
        with trio.fail_after(20):
            while what not in self.written(container):  # noqa: ASYNC110  another process writes
                await trio.sleep(0.002)

    async def becomes(self, container: str, state: str) -> None:
        """Wait until a container is in a state."""
        with trio.fail_after(20):
            while (await self.containers.status(container)).state != state:  # noqa: ASYNC110
                await trio.sleep(0.002)

    async def appears(self, container: str) -> None:
        """Wait until there is such a container."""
        with trio.fail_after(20):
            while not self.exists(container):  # noqa: ASYNC110
                await trio.sleep(0.002)

    async def goes(self, container: str) -> None:
        """Wait until there is no such container."""
        with trio.fail_after(20):
            while self.exists(container):  # noqa: ASYNC110
                await trio.sleep(0.002)

    def exists(self, container: str) -> bool:
        with self.stores.root.meta.read() as txn:
            return CONTAINERS.any(txn, self.stores.namespace, container)

    def has_content(self, digest: str) -> bool:
        with self.stores.root.meta.read() as txn:
            return BLOBS.any(txn, self.stores.namespace, digest)

    def note(self, container: str) -> None:
        """Have it looked for what is left of a container that another process launched."""
        self.scene.uniques.add(self.record(container).unique)

    def kill_monitor(self, container: str) -> None:
        """Kill who watches over a container."""
        os.kill(int((self.folder(container) / "monitor").read_text()), signal.SIGKILL)

    def held(self, monkeypatch: pytest.MonkeyPatch, state: str) -> "Gate":
        """Have the next launch stay in a state until the gate is opened."""
        gate = Gate(trio.lowlevel.current_trio_token())
        launching = self.containers._launching
        if state == "preparing":
            prepare = launching._prepare

            def prepared(*arguments: Any) -> Any:
                gate.wait()
                return prepare(*arguments)

            monkeypatch.setattr(launching, "_prepare", prepared)
        else:
            start = launching._monitors.start

            async def started(*arguments: Any) -> Any:
                await trio.to_thread.run_sync(gate.wait)
                return await start(*arguments)

            monkeypatch.setattr(launching._monitors, "start", started)
        return gate

    def record(self, container: str) -> Container:
        """Return the record of a container that is there."""
        with self.stores.root.meta.read() as txn:
            found = CONTAINERS.get(txn, self.stores.namespace, container)
        assert found is not None, container
        return found

    def folder(self, container: str) -> Path:
        return self.stores.root.path / "containers" / self.record(container).unique


@dataclass
class Scene:
    """A place for a store, and an image in it."""

    root: Path
    layout: Path
    backend: str = "overlay"
    uniques: set[str] = field(default_factory=set)

    def run(self, work: Callable[[Floor], Any], *, imports: bool = True, unpacks: bool = True) -> Any:
        """Open the engine, with workers in this process, and have `work` done."""

        async def opened() -> Any:
            async with open_engine(self.root) as engine:
                with workers_inline(pytest.MonkeyPatch(), engine.stores.root) as gates:
                    async with open_containerizer(engine) as containers:
                        floor = Floor(self, engine, containers, gates)
                        if imports:
                            await floor.bring(self.layout, unpacks=unpacks)
                        return await work(floor)

        return trio.run(opened)

    def clear(self) -> None:
        """Destroy all containers, then check that nothing of any is left."""

        async def all_gone(floor: Floor) -> None:
            for one in await floor.containers.walk():
                self.uniques.add(one.unique)
                await floor.containers.destroy(one.id)
            await floor.engine.collect()  # the leases of those who were killed

        self.run(all_gone, imports=False)
        assert_nothing_runs(self.root, self.uniques)


@contextmanager
def scene(folder: Path, backend: str = "overlay", **config: Any) -> Iterator[Scene]:
    """Give an image and a place for a store; in the end all containers go, without a trace."""
    peer("runc")
    made = Scene(folder / "root", image(folder / "layout", **config), backend)
    try:
        yield made
    finally:
        made.clear()


def assert_nothing_runs(root: Path, uniques: Collection[str]) -> None:
    """Check that there is no container on a root, nor anything that was made for these ones."""
    with Root(root) as opened, opened.meta.read() as txn:
        for table in (CONTAINERS, MOUNTS, LEASES):
            assert not table.any(txn), table.name
    left = [path for name in ("containers", "runtime") for path in (root / name).glob("*")]
    # A cgroup cannot go while there are processes in it.
    for one in uniques:
        left += [*CGROUPS.glob(f"lamina-{one}"), *CGROUPS.glob(f"*/lamina-{one}")]
    assert left == []
    assert mounted_below(root) == []
    until(lambda: working_for(root) == [])  # a monitor tells of the end before its own


def mounted_below(root: Path) -> list[str]:
    """Return what is mounted on a root."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{root.absolute()}/")]


def working_for(root: Path) -> list[str]:
    """Return the processes that have something open on a root, but for this one: monitors."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            files = [os.readlink(file) for file in (entry / "fd").iterdir()]
            is_other = int(entry.name) != os.getpid()
            if is_other and any(file.startswith(f"{root.absolute()}/") for file in files):
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
    return found
