"""Steps that the tests of registries share: a fake one with an image, and a client of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import trio

from engine.oci.documents import Descriptor
from engine.oci.reference import Reference, parse_reference
from engine.registry.client import Access, Client, open_client
from engine.registry.retrying import Patience
from engine.testing.archives import pack
from engine.testing.fake_registry import FakeRegistry
from tests.engine.image_files import CONFIG, HELLO, LAYER, MANIFEST, config_of

T = TypeVar("T")

QUICK = Patience(
    connect=10, answer=10, progress=10, first_wait=0.001, longest_wait=0.002, longest_asked=0.5
)
"""A test's patience: the next attempt is made at once."""

HURRIED = replace(QUICK, connect=0.1, answer=0.1, progress=0.1)
"""That of a test of hosts that say nothing: they are given up at once, too."""


class Served:
    """An image in a fake registry, by its parts."""

    def __init__(self, registry: FakeRegistry, layers: tuple[bytes, ...] = (HELLO,)) -> None:
        self.registry = registry
        config = json.dumps(config_of(layers)).encode()
        packed = [pack(layer, "gzip") for layer in layers]
        self.config = self._put("blobs", config, CONFIG)
        self.layers = [self._put("blobs", data, LAYER + suffix) for suffix, data in packed]
        self.data = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": _shape(self.config),
                "layers": [*map(_shape, self.layers)],
            }
        ).encode()
        self.manifest = self._put("manifests", self.data, MANIFEST, "1")

    def _put(self, kind: str, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        digest = self.registry.put("a", kind, data, media_type, tag)
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    @property
    def reference(self) -> Reference:
        return parse_reference(f"{self.registry.name}/a:1")


def _shape(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def with_client(work: Callable[[Client], Any], access: Access | None = None) -> Any:
    """Run `work` with a client that is in a hurry, on a loop of its own."""

    async def run() -> Any:
        async with open_client(access or Access(patience=QUICK)) as client:
            return await work(client)

    return trio.run(run)


async def read_blob(client: Client, served: Served, descriptor: Descriptor, offset: int = 0) -> bytes:
    """Read a blob to its end, once."""
    found = bytearray()
    async with client.blob(served.reference, descriptor, offset) as body:
        while chunk := await body.read():
            found += chunk
    return bytes(found)
