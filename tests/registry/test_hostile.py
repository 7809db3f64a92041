"""What registries and images try that is none of the behaviours in the tables: each costs little."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.registry.client import open_client
from engine.testing.fake_registry import FakeRegistry
from tests.command import lamina, lamina_json
from tests.engine.image_files import AMD64, ARM64, CONFIG, INDEX, MANIFEST
from tests.registry.asking import Served
from tests.registry.test_sharing_pulls import access, engine_at

pytestmark = pytest.mark.root


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().running() as running:
        yield running


def for_two_platforms(registry: FakeRegistry) -> str:
    """Serve an index of two images that have one layer, and return its name."""
    one = Served(registry)
    config = json.loads(registry.content[f"/a/blobs/{one.config.digest}"][1]) | ARM64
    manifest = json.loads(one.data)
    manifest["config"] = _put(registry, "blobs", config, CONFIG)
    other = _put(registry, "manifests", manifest, MANIFEST)
    mine = {"mediaType": MANIFEST, "digest": one.manifest.digest, "size": one.manifest.size}
    listed = [mine | {"platform": AMD64}, other | {"platform": ARM64}]
    _put(registry, "manifests", {"schemaVersion": 2, "manifests": listed}, INDEX, "two")
    return f"{registry.name}/a:two"


def _put(
    registry: FakeRegistry, kind: str, value: Any, media_type: str, tag: str = ""
) -> dict[str, Any]:
    data = json.dumps(value).encode()
    digest = registry.put("a", kind, data, media_type, tag)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def test_a_layer_that_one_platform_let_go_of_is_fetched_for_another(
    tmp_path: Path, registry: FakeRegistry, umask_0: None
) -> None:
    name = for_two_platforms(registry)

    async def pull(**options: Any) -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            await engine.pull(name, client, snapshotter="overlay", keep_blobs=False, **options)

    trio.run(pull)
    lamina(tmp_path, "gc")
    trio.run(lambda: pull(all_platforms=True))
    lamina(tmp_path, "gc")
    (image,) = lamina_json(tmp_path, "images")
    assert "error" not in image
    lamina(tmp_path, "fsck")
    lamina(tmp_path, "unpack", name, "--platform", "linux/arm64", "--snapshotter", "overlay")
