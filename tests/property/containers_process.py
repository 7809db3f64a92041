"""A process that makes containers, removes them, collects and dies as it is told.

Async; how it is told, see `tests.property.obeying`. Whoever works on a container stops at each of the
points that tests may strike at, until he is let on.
"""

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel

from engine import failpoints, labels, processes
from engine.app import Engine
from engine.errors import EngineError, NotFound
from engine.kv.schema import Container
from engine.metadata.containers import ContainerState
from engine.metadata.references import CONTAINER
from engine.mount import deactivate
from engine.mounts.table import MountTable, is_mounted
from engine.oci.digest import parse_digest
from engine.provision import destroying, provisioner, rootfs
from engine.provision.places import all_folders, folder_of, target_of
from engine.provision.provisioner import Provisioner
from engine.registry.client import Client
from engine.stores import Stores
from tests.command import dump
from tests.property.obeying import Job, Log, client_of, opened, serve, tag
from tests.property.pulls_process import BACKENDS, CONTENT, PARTS, PLATFORMS, TARGETS

__all__ = ["IDS", "files_in"]

IDS = ("a", "b", "c")
_PLATFORM = PLATFORMS[0]
_PATIENCE_S = 0.05  # for those who are let on; then others have a turn
_ENDS_AT_ONCE = (
    ContainerState.PREPARING,
    ContainerState.STARTING,
    ContainerState.RUNNING,
)


class _Gate:
    """Holds who works on a container at each point where tests may strike, until he is let on."""

    def __init__(self) -> None:
        self._may = threading.Semaphore(0)
        self._is_open = False
        self.passed = 0

    def let(self, count: int) -> None:
        self._may.release(count)

    def open(self) -> None:
        self._is_open = True
        self._may.release(1000)

    def hit(self, name: str) -> None:
        if not self._is_open and not trio.lowlevel.in_trio_run():  # that is the thread which lets on
            self._may.acquire()
        failpoints.hit(name)
        self.passed += 1


@contextmanager
def _of_boot(job: Job) -> Iterator[None]:
    """Have this be the boot of a job: what the kernel says is in a file of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Path", lambda _kernel: Path(job["boot"]))
        yield


class _Work:
    """The steps of one process, one after the other, beside the tasks that they start."""

    def __init__(self, job: Job, log: Log, engine: Engine, client: Client) -> None:
        self._job = job
        self._told = log
        self._engine = engine
        self._client = client
        self._stores = engine.stores
        self._provisioner = Provisioner(engine, stop=_stop)
        self._gate = _Gate()
        self._scopes: list[trio.CancelScope] = []
        self._running = 0
        self._sat: list[int] = []

    def _log(self, **line: Any) -> None:
        self._told(process=self._job["process"], **line)

    async def run(self) -> None:
        for name, target in self._job["tags"].items():
            tag(CONTENT, name, TARGETS[target])
        failpoints.rearm(self._job["failpoints"])
        with pytest.MonkeyPatch.context() as patch:
            for module in (destroying, provisioner, rootfs):
                patch.setattr(module, "hit", self._gate.hit)
            try:
                async with trio.open_nursery() as nursery:
                    for number, (what, *words) in enumerate(self._job["steps"]):
                        step: Callable[..., Awaitable[dict[str, Any]]] = getattr(self, f"_{what}")
                        if what in {"provision", "destroy", "recover", "pull"}:
                            scope = trio.CancelScope()
                            self._scopes.append(scope)
                            self._running += 1
                            nursery.start_soon(self._task, number, scope, what, step, words)
                        else:
                            await self._one(number, what, step, words)
                    self._gate.open()
            finally:
                self._gate.open()
        for opened_file in self._sat:
            os.close(opened_file)

    async def _task(self, number: int, scope: trio.CancelScope, *rest: Any) -> None:
        try:
            with scope:
                await self._one(number, *rest)
        finally:
            self._running -= 1
            if scope.cancelled_caught:
                self._log(step=number, ends="cancelled")

    async def _one(
        self, number: int, what: str, step: Callable[..., Awaitable[dict[str, Any]]], words: list[Any]
    ) -> None:
        self._log(step=number, begins=what, words=words)
        try:
            told = await step(*words)
        except EngineError as error:
            self._log(step=number, ends="failed", error=type(error).__name__, why=str(error))
        else:
            self._log(step=number, ends="done", **told)

    # -- tasks ----------------------------------------------------------------------------

    async def _provision(self, container: str, options: dict[str, Any]) -> dict[str, Any]:
        made = await self._provisioner.provision(
            container,
            options["image"],
            parent=options["parent"],
            volumes=options["volumes"],
            readonly=options["readonly"],
            snapshotter=options["backend"],
            labels={labels.EPHEMERAL: "yes"} if options["ephemeral"] else {},
            client=self._client if options["pulls"] else None,
        )
        is_mounted_now = all(map(is_mounted, [made.rootfs, *made.volumes.values()]))
        return {
            "unique": made.container.unique,
            "target": made.container.target,
            "mounted": is_mounted_now,
        }

    async def _destroy(self, container: str) -> dict[str, Any]:
        return {"was_there": await self._provisioner.destroy(container)}

    async def _recover(self, known: list[str] | None) -> dict[str, Any]:
        found = await self._provisioner.recover(known)
        failed = dict(found.failed)
        return {"kept": list(found.kept), "destroyed": list(found.destroyed), "failed": failed}

    async def _pull(self, name: str, backend: str) -> dict[str, Any]:
        await self._engine.pull(name, self._client, snapshotter=backend)
        return {}

    # -- between them ---------------------------------------------------------------------

    async def _let(self, count: int) -> dict[str, Any]:
        enough = self._gate.passed + count
        self._gate.let(count)
        with trio.move_on_after(_PATIENCE_S):
            while self._running and self._gate.passed < enough:  # noqa: ASYNC110  threads pass
                await trio.sleep(0.001)
        return {}

    async def _cancel(self, which: int) -> dict[str, Any]:
        if self._scopes:
            self._scopes[which % len(self._scopes)].cancel()
            await trio.lowlevel.checkpoint()
        return {}

    async def _remove(self, name: str) -> dict[str, Any]:
        with suppress(NotFound):
            await self._engine.remove_image(name)
        return {}

    async def _prune(self, keep: list[str]) -> dict[str, Any]:
        await self._provisioner.prune(keep)
        return {}

    async def _collect(self) -> dict[str, Any]:
        await self._engine.collect()
        return {}

    async def _move(self, name: str, target: str) -> dict[str, Any]:
        tag(CONTENT, name, TARGETS[target])
        return {}

    async def _update(self, container: str) -> dict[str, Any]:
        await self._provisioner.update(container, labels={"new": "yes"})
        return {}

    async def _write(self, container: str, name: str, text: str) -> dict[str, Any]:
        """Write to a live root file system; without a text the file is deleted."""
        found = self._writable(container)
        if found is None:
            return {}
        file = target_of(folder_of(self._stores.root.path, found.unique), 0) / name
        self._log(writes=name, unique=found.unique, text=text)
        try:
            if text:
                file.write_text(text)
            else:
                file.unlink(missing_ok=True)
        except OSError:  # it was unmounted meanwhile
            return {}
        return {"wrote": name, "unique": found.unique, "text": text}

    async def _sit(self, container: str) -> dict[str, Any]:
        """Stay in a root file system until the end of this process."""
        found = self._writable(container)
        if found is not None:
            place = target_of(folder_of(self._stores.root.path, found.unique), 0)
            with suppress(FileNotFoundError):
                self._sat.append(os.open(place, os.O_RDONLY | os.O_DIRECTORY))
        return {}

    async def _vanish(self, container: str) -> dict[str, Any]:
        """Unmount a root file system behind everybody's back."""
        found = self._writable(container)
        if found is not None:
            self._log(vanishes=found.unique)
            with suppress(EngineError):  # it was unmounted meanwhile
                deactivate(target_of(folder_of(self._stores.root.path, found.unique), 0), lazy=True)
        return {}

    def _writable(self, container: str) -> Container | None:
        """Return a container with a root that is mounted and may be written to, if it is that."""
        try:
            found = self._stores.containers.get(container)
        except NotFound:
            return None
        place = target_of(folder_of(self._stores.root.path, found.unique), 0)
        is_live = found.state in {ContainerState.PROVISIONED, ContainerState.RUNNING}
        is_there = is_live and place.exists() and is_mounted(place)
        return found if is_there and not found.readonly else None

    async def _run(self, container: str) -> dict[str, Any]:
        """Have something begin to run in a container, as far as its record tells."""
        found = self._stores.containers.get(container)
        for state in _ENDS_AT_ONCE:
            found = self._stores.containers.move(found, state)
        return {}

    async def _die(self) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


async def _stop(_container: Container) -> None:
    """End what runs in a container: nothing does."""


async def _steps(job: Job, log: Log) -> None:
    with _of_boot(job):
        async with client_of(CONTENT) as client, opened(job) as engine:
            await _Work(job, log, engine, client).run()


# -- looking ---------------------------------------------------------------------------------------


async def _look(job: Job, log: Log) -> None:
    """Tell what there is."""
    root = Path(job["root"])
    with _of_boot(job):
        async with opened(job) as engine:
            stores = engine.stores
            found = stores.containers.walk()
            log(
                containers=[
                    {**msgspec.structs.asdict(one), "order": "", **_seen(stores, one)} for one in found
                ],
                names={image.name: image.target.digest for image in stores.images.walk()},
                blobs=sorted(blob.digest for blob in stores.content.walk()),
                snapshots=[
                    (name, info.key) for name in BACKENDS for info in stores.snapshotter(name).walk()
                ],
                held=_held(stores),
            )
    folder = all_folders(root)
    left = dump(root)
    points = [entry.point for entry in MountTable.read_own().own.entries]
    log(
        folders=sorted(os.listdir(folder)) if folder.exists() else [],
        mounted=sorted(point for point in points if point.startswith(f"{root}/")),
        mounts=left["mounts"],
        left={name: len(left[name]) for name in ("ingests", "leases", "lease_items", "trash")},
    )


def _seen(stores: Stores, container: Container) -> dict[str, Any]:
    """Return what a container has: where, and the files in what is mounted there."""
    folder = folder_of(stores.root.path, container.unique)
    targets = [target_of(folder, number) for number in range(len(container.volumes) + 1)]
    paths = ["/", *sorted(container.volumes)]
    return {
        "targets": [str(target) for target in targets],
        "files": {
            path: files_in(target)
            for path, target in zip(paths, targets, strict=True)
            if target.exists() and is_mounted(target)
        },
        "is_held": stores.containers.is_held(container),
    }


def _held(stores: Stores) -> dict[str, list[str]]:
    """Return the targets that containers hold; all that belongs to these is whole."""
    held: dict[str, list[str]] = defaultdict(list)
    for one in stores.references.walk():
        for digest in PARTS[one.target, _PLATFORM]:
            stores.content.verify(parse_digest(digest))
        held[one.owner.removeprefix(CONTAINER)].append(one.target)
    return held


def files_in(folder: Path) -> dict[str, str]:
    """Return what the files right in a folder say."""
    return {entry.name: entry.read_text() for entry in folder.iterdir() if entry.is_file()}


if __name__ == "__main__":
    serve({"steps": _steps, "look": _look})
