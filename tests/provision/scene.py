"""A registry, a store and a provisioner, for tests of the root file systems of containers."""

import json
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from engine.app import Engine, open_engine
from engine.kv.schema import CONTAINERS, LEASES, MOUNTS, SNAPSHOTS, TRASH, Container
from engine.kv.table import Damaged, Table
from engine.metadata.references import CONTAINER
from engine.mount import deactivate_below
from engine.mounts.table import MountTable
from engine.provision.provisioned import Provisioned
from engine.provision.provisioner import Provisioner, Stop
from engine.registry.client import Access, Client, open_client
from engine.snapshots import Kind
from engine.stores import Stores
from engine.testing.archives import archive, member, pack
from engine.testing.fake_registry import FakeRegistry
from tests.conftest import AMD64
from tests.engine.image_files import CONFIG, LAYER, MANIFEST, config_of
from tests.inline import workers_inline
from tests.registry.asking import QUICK

__all__ = ["Bench", "Host", "assert_nothing_left", "bench", "mounted_below", "reboot", "several_looks"]

BASE = archive(member("etc/", "5", mode=0o755), member("etc/name", data=b"base\n"))


@dataclass
class Host:
    """What a test works with while an engine is open."""

    bench: "Bench"
    engine: Engine
    client: Client
    provisioner: Provisioner

    @property
    def stores(self) -> Stores:
        return self.engine.stores

    async def pull(self, tag: str, snapshotter: str | None = None) -> None:
        """Have an image of the registry, unpacked."""
        name = self.bench.name(tag)
        await self.engine.pull(name, self.client, snapshotter=snapshotter or self.bench.backend)

    async def provision(self, container: str, tag: str = "one", **options: Any) -> Provisioned:
        """Provision an image of the registry, by its tag."""
        options.setdefault("snapshotter", self.bench.backend)
        return await self.provisioner.provision(container, self.bench.name(tag), **options)


@dataclass
class Bench:
    """A registry and the place of a store."""

    registry: FakeRegistry
    root: Path
    backend: str = "overlay"

    def name(self, tag: str) -> str:
        return f"{self.registry.name}/a:{tag}"

    def serve(self, tag: str, *layers: bytes, **config: Any) -> str:
        """Put an image under a tag; return its digest."""
        about = json.dumps({**config_of(layers, **config), "author": tag}).encode()
        packed = [pack(data, "gzip") for data in layers]
        value = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._put("blobs", about, CONFIG),
            "layers": [self._put("blobs", data, LAYER + suffix) for suffix, data in packed],
        }
        made = self._put("manifests", json.dumps(value).encode(), MANIFEST, tag)
        return str(made["digest"])

    def _put(self, kind: str, data: bytes, media_type: str, tag: str = "") -> dict[str, Any]:
        digest = self.registry.put("a", kind, data, media_type, tag)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def run(
        self,
        work: Callable[[Host], Awaitable[Any]],
        *,
        pulled: Sequence[str] = ("one",),
        stop: Stop | None = None,
    ) -> Any:
        """Open the engine, with workers in this process, and have `work` done."""

        async def opened() -> Any:
            async with open_engine(self.root, platform=AMD64) as engine:
                with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                    async with open_client(Access(patience=QUICK)) as client:
                        host = Host(self, engine, client, Provisioner(engine, stop=stop))
                        for tag in pulled:
                            await host.pull(tag)
                        return await work(host)

        return trio.run(opened)


async def several_looks(stores: Stores, times: int = 3) -> None:
    """Return once those who wait for another's work have looked so often."""
    seen = 0
    find = stores.containers.find

    def counted(name: str) -> tuple[Container, bool] | None:
        nonlocal seen
        seen += 1
        return find(name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stores.containers, "find", counted)
        while seen < times:  # noqa: ASYNC110  other threads count
            await trio.sleep(0.001)


@contextmanager
def bench(root: Path, backend: str = "overlay") -> Iterator[Bench]:
    """Give a registry with the images `one`, of two layers, and `two`, and a place for a store."""
    with FakeRegistry().running() as registry:
        made = Bench(registry, root, backend)
        made.serve("one", BASE, archive(member("own", data=b"one\n")))
        made.serve("two", BASE, archive(member("own", data=b"two\n")))
        try:
            yield made
        finally:
            deactivate_below(root)


def mounted_below(folder: Path) -> list[str]:
    """Return what is mounted below a folder, in this namespace."""
    points = (entry.point for entry in MountTable.read_own().own.entries)
    return [point for point in points if point.startswith(f"{folder}/")]


def reboot(stores: Stores, boot: str = "another boot") -> None:
    """Have everything be as another boot left it: nothing is mounted, and what is recorded is older."""
    deactivate_below(stores.root.path)
    with stores.root.meta.write() as txn:
        tables: tuple[Table[Any], ...] = (CONTAINERS, MOUNTS)
        for table in tables:
            for (namespace, key), record in list(table.entries(txn)):
                assert not isinstance(record, Damaged)
                table.put(txn, replace(record, boot=boot), namespace, key)


def assert_nothing_left(stores: Stores) -> None:
    """Check that there is nothing of any container: record, reference, mount, snapshot, folder."""
    assert mounted_below(stores.root.path) == []
    with stores.root.meta.read() as txn:
        for table in (CONTAINERS, MOUNTS, TRASH):
            assert not table.any(txn), table.name
        assert [lease for lease in LEASES.scan(txn) if _is_ours(lease)] == []
        snapshots = [record for _, record in SNAPSHOTS.entries(txn)]
    assert all(record.kind == Kind.COMMITTED for record in snapshots)  # type: ignore[union-attr]
    folder = stores.root.path / "containers"
    assert not folder.exists() or os.listdir(folder) == []
    assert os.listdir(stores.root.trash) == []


def _is_ours(lease: Any) -> bool:
    owner = lease.labels.get("lamina.held/owner", "")
    return lease.owner is not None or str(owner).startswith(CONTAINER)
