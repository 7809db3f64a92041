"""A process that pulls, cancels, removes, collects and dies as it is told, beside a registry of its own.

Async; how it is told, see `tests.property.obeying`.
"""

import json
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import trio
import trio.lowlevel

from engine.app import Engine
from engine.content.image import resolve
from engine.errors import NotFound
from engine.images.states import parts_of
from engine.oci.platform import parse_platform
from engine.registry.client import Client
from engine.stores import Stores
from engine.testing.archives import archive, member, pack
from engine.testing.fake_registry import Asked, FakeRegistry
from tests.command import dump
from tests.engine.image_files import (
    AMD64,
    ARM64,
    CONFIG,
    DOCKER_LIST,
    INDEX,
    LAYER,
    MANIFEST,
    config_of,
)
from tests.property.obeying import Job, Log, client_of, opened, serve, tag

__all__ = ["BACKENDS", "CONTENT", "LAYERS", "NAMES", "PARTS", "PLATFORMS", "TARGETS"]

NAMES = ("r.example/a:1", "r.example/a:2", "r.example/a:3")
BACKENDS = ("overlay", "copy")
PLATFORMS = ("linux/amd64", "linux/arm64")
_FOREVER = 1 << 60
_PATIENCE_S = 0.2  # for requests that are let through; then others have a turn


# -- what there is ---------------------------------------------------------------------------------

LAYERS = {"one": (0, 1), "two": (0, 2), "alone": (1, 0, 1)}
"""The layers of each target for linux/amd64: layer N has the files `both`, with N in it, and `onlyN`."""
_LAYERS = [archive(member("both", data=b"%d" % n), member(f"only{n}")) for n in range(4)]
_ON = {"linux/amd64": AMD64, "linux/arm64": ARM64}


def _made() -> tuple[FakeRegistry, dict[str, str], dict[tuple[str, str], list[str]]]:
    """Return a registry, targets by their names, and the blobs of each for a platform."""
    registry = FakeRegistry()
    parts: dict[tuple[str, str], list[str]] = {}

    def image(platform: str, layers: tuple[int, ...]) -> dict[str, Any]:
        def put(data: bytes, media_type: str) -> dict[str, Any]:
            digest = registry.put("a", "blobs", data, media_type)
            return {"mediaType": media_type, "digest": digest, "size": len(data)}

        config = {**config_of([_LAYERS[n] for n in layers]), **_ON[platform]}
        packed = [pack(_LAYERS[n], "gzip") for n in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": put(json.dumps(config).encode(), CONFIG),
            "layers": [put(data, LAYER + suffix) for suffix, data in packed],
        }
        data = json.dumps(manifest).encode()
        digest = registry.put("a", "manifests", data, MANIFEST)
        below = [manifest["config"]["digest"], *(one["digest"] for one in manifest["layers"])]
        parts[digest, platform] = [digest, *below]
        about = {"mediaType": MANIFEST, "digest": digest, "size": len(data)}
        return {**about, "platform": _ON[platform]}

    def index(kind: str, **images: tuple[int, ...]) -> str:
        entries = [image(f"linux/{name}", layers) for name, layers in images.items()]
        value = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
        digest = registry.put("a", "manifests", json.dumps(value).encode(), kind)
        for entry, name in zip(entries, images, strict=True):
            parts[digest, f"linux/{name}"] = [digest, *parts[entry["digest"], f"linux/{name}"]]
        return digest

    one = index(INDEX, amd64=LAYERS["one"], arm64=(0, 2))
    two = index(DOCKER_LIST, amd64=LAYERS["two"], arm64=(0, 3))
    # No index, and a layer twice.
    alone = image("linux/amd64", LAYERS["alone"])["digest"]
    return registry, {"one": one, "two": two, "alone": alone}, parts


CONTENT, TARGETS, PARTS = _made()
"""What the registry has; digests of what names may mean; and by digest and platform all blobs of it."""


# -- what is done ----------------------------------------------------------------------------------


class _Gate:
    """Holds every request until it is let through."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._may = threading.Semaphore(0)
        self._is_open = False
        self.answered = 0

    def let(self, count: int) -> None:
        self._may.release(count)

    def open(self) -> None:
        self._is_open = True
        self._may.release(1000)

    def __call__(self, connection: socket, asked: Asked, good: bytes) -> bool:
        self._log(asked=asked.path.rpartition("/")[2], kind=asked.path.split("/")[-2])
        if not self._is_open:
            self._may.acquire()
        connection.sendall(good)
        self.answered += 1
        return True


class _Work:
    """The steps of one process, one after the other, beside the pulls that they start."""

    def __init__(self, job: Job, log: Log, engine: Engine, client: Client) -> None:
        self._job = job
        self._log = log
        self._engine = engine
        self._client = client
        self._registry = CONTENT
        self._gate = _Gate(log)
        self._scopes: list[trio.CancelScope] = []
        self._running = 0

    async def run(self) -> None:
        self._registry.plan("", self._gate, times=_FOREVER)
        for name, target in self._job["tags"].items():
            tag(self._registry, name, TARGETS[target])
        try:
            async with trio.open_nursery() as nursery:
                for number, (what, *words) in enumerate(self._job["steps"]):
                    if what == "pull":
                        scope = trio.CancelScope()
                        self._scopes.append(scope)
                        self._running += 1
                        nursery.start_soon(self._pull, number, scope, *words)
                    else:
                        await getattr(self, f"_{what}")(number, *words)
                self._gate.open()
        finally:
            self._gate.open()

    async def _pull(
        self, number: int, scope: trio.CancelScope, name: str, platform: str, backend: str
    ) -> None:
        self._log(step=number, begins="pull", name=name, platform=platform, backend=backend)
        try:
            with scope:
                pulled = await self._engine.pull(
                    name,
                    self._client,
                    snapshotter=backend,
                    platform=parse_platform(platform),
                )
                self._log(step=number, ends="pulled", target=pulled.image.target.digest)
        finally:
            self._running -= 1
            if scope.cancelled_caught:
                self._log(step=number, ends="cancelled")

    async def _let(self, _number: int, count: int) -> None:
        enough = self._gate.answered + count
        self._gate.let(count)
        with trio.move_on_after(_PATIENCE_S):
            while self._running and self._gate.answered < enough:  # noqa: ASYNC110  threads answer
                await trio.sleep(0.001)

    async def _cancel(self, _number: int, which: int) -> None:
        if self._scopes:
            self._scopes[which % len(self._scopes)].cancel()
            await trio.lowlevel.checkpoint()

    async def _remove(self, number: int, name: str) -> None:
        self._log(step=number, begins="remove", name=name)
        with suppress(NotFound):
            await self._engine.remove_image(name)
            self._log(step=number, ends="removed")

    async def _collect(self, number: int) -> None:
        self._log(step=number, begins="collect")
        await self._engine.collect()

    async def _move(self, number: int, name: str, target: str) -> None:
        self._log(step=number, begins="move", name=name, target=TARGETS[target])
        tag(self._registry, name, TARGETS[target])

    async def _die(self, _number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


async def _steps(job: Job, log: Log) -> None:
    async with client_of(CONTENT) as client, opened(job) as engine:
        await _Work(job, log, engine, client).run()


async def _look(job: Job, log: Log) -> None:
    """Tell what there is; with `collects` after a collection."""
    async with opened(job) as engine:
        if job["collects"]:
            await engine.collect()
        stores = engine.stores
        log(
            images={image.name: _told(stores, image.target) for image in stores.images.walk()},
            blobs=sorted(blob.digest for blob in stores.content.walk()),
            snapshots=sorted(
                f"{name} {info.key}" for name in BACKENDS for info in stores.snapshotter(name).walk()
            ),
        )
    left = dump(Path(job["root"]))
    log(left={name: len(left[name]) for name in ("ingests", "leases", "lease_items", "trash")})


def _told(stores: Stores, target: Any) -> dict[str, Any]:
    """Return what an image's name means, and for which platforms and backends it is whole."""
    whole: dict[str, list[str]] = {}
    for platform in PLATFORMS:
        with suppress(NotFound):
            read = partial(_read, stores)
            image = resolve(target, parse_platform(platform), read)
            for part in (*image.path, image.manifest.config, *image.manifest.layers):
                stores.content.verify(part.key)
            whole[platform] = sorted(parts_of(stores, image).unpacked)
    return {"target": target.digest, "whole": whole}


def _read(stores: Stores, descriptor: Any, limit: int) -> bytes:
    return stores.content.read_all(descriptor.key, limit)


if __name__ == "__main__":
    serve({"steps": _steps, "look": _look})
