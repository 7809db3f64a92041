"""An engine, a client and a registry with images, for tests of who holds what; time is moved by hand."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.images.coordinating import Coordinator
from engine.images.service import ImageService
from engine.kv.schema import BLOBS, IMAGES, LEASES, SNAPSHOTS
from engine.oci.digest import parse_digest
from engine.registry.client import Access, Client, open_client
from engine.stores import Stores
from engine.testing.archives import archive, member, pack
from engine.testing.fake_registry import FakeRegistry
from tests.clocks import HandClock, clock_by_hand
from tests.conftest import AMD64
from tests.engine.image_files import CONFIG, LAYER, MANIFEST, config_of
from tests.inline import workers_inline
from tests.registry.asking import QUICK

__all__ = ["DELAY_S", "Desk", "Scene", "assert_complete", "assert_empty", "scene"]

DELAY_S = 3600.0


@dataclass
class Desk:
    """What a test works with while an engine is open."""

    scene: "Scene"
    engine: Engine
    client: Client
    coordinator: Coordinator
    service: ImageService

    @property
    def stores(self) -> Stores:
        return self.engine.stores

    async def acquire(self, image: str, owner: str, **options: Any) -> Any:
        """Hold an image of the registry, by its tag."""
        name = self.scene.name(image)
        return await self.coordinator.acquire(name, owner, self.client, snapshotter="overlay", **options)

    async def later(self, seconds: float = DELAY_S) -> None:
        """Let time pass, and collect."""
        self.scene.clock.at += int(seconds * 10**9)
        await self.engine.collect()


@dataclass
class Scene:
    """A registry and a store."""

    registry: FakeRegistry
    root: Path
    clock: HandClock
    ids: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)

    def name(self, tag: str) -> str:
        return f"{self.registry.name}/a:{tag}"

    def serve(self, tag: str, what: str = "", compression: str = "gzip", **config: Any) -> str:
        """Put an image under a tag, told from others by a file; return its ID."""
        base = archive(member("base", data=b"base\n" * 1000))
        own = archive(member("own", data=(what or tag).encode()))
        about = json.dumps(config_of((base, own), **config)).encode()
        layers = [pack(data, compression) for data in (base, own)]
        value = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._put("blobs", about, CONFIG),
            "layers": [self._put("blobs", data, LAYER + suffix) for suffix, data in layers],
        }
        made = self._put("manifests", json.dumps(value).encode(), MANIFEST, tag)
        self.ids[tag], self.targets[tag] = value["config"]["digest"], made["digest"]  # type: ignore[index]
        return self.ids[tag]

    def _put(self, kind: str, data: bytes, media_type: str, tag: str = "") -> dict[str, Any]:
        digest = self.registry.put("a", kind, data, media_type, tag)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    async def asked(self, what: str, times: int = 1) -> None:
        """Wait until the registry was asked for something so often."""
        while self.registry.count(what) < times:  # noqa: ASYNC110  another thread counts
            await trio.sleep(0.001)

    def run(self, work: Callable[[Desk], Any], **options: Any) -> Any:
        """Open the engine, with workers in this process, and have `work` done."""

        async def opened() -> Any:
            async with open_engine(self.root, platform=AMD64) as engine:
                with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                    async with open_client(Access(patience=QUICK)) as client:
                        coordinator = Coordinator(engine, **{"delay_s": DELAY_S, **options})
                        service = ImageService(engine, "overlay")
                        return await work(Desk(self, engine, client, coordinator, service))

        return trio.run(opened)


@contextmanager
def scene(root: Path) -> Iterator[Scene]:
    """Give a registry with the images `one` and `two`, and a place for a store."""
    with clock_by_hand() as clock, FakeRegistry().running() as registry:
        made = Scene(registry, root, clock)
        made.serve("one")
        made.serve("two")
        yield made


def assert_complete(stores: Stores, image: str) -> None:
    """Check that an image, by its ID, can be run: with all its bytes, and unpacked."""
    with stores.root.meta.read() as txn:
        above = [
            blob
            for blob in BLOBS.scan(txn, stores.namespace)
            if image in blob.labels.values() or blob.digest == image
        ]
    assert len(above) >= 2, "its config, or what names that, is gone"
    for blob in above:
        for part in (blob.digest, *(v for v in blob.labels.values() if v.startswith("sha256:"))):
            if blob.digest != image:
                stores.content.verify(parse_digest(part))
    (config,) = [blob for blob in above if blob.digest == image]
    top = config.labels["containerd.io/gc.ref.snapshot.overlay"]
    assert stores.snapshotter("overlay").stat(top)


def assert_empty(stores: Stores) -> None:
    """Check that nothing is left, of any kind."""
    with stores.root.meta.read() as txn:
        for table in (BLOBS, IMAGES, LEASES, SNAPSHOTS):
            assert not table.any(txn), table.name
