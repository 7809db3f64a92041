"""Makes a store of as many records as asked for: real manifests and configs, layers of a record alone.

The records go through the engine's own ledger in large transactions: to import as many images would take
a day. Every tenth image, record and snapshot has no name that holds it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from engine import labels
from engine.kv.schema import COUNTERS, Blob, Image, Snapshot
from engine.metadata import ledger
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor
from engine.oci.identity import chain_ids
from engine.snapshots import Kind
from engine.stores import Stores, host_platform

__all__ = ["BACKEND", "NAMESPACE", "Shape", "base_layer", "fill", "image_name"]

NAMESPACE, BACKEND = "default", "overlay"

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_LAYER_BYTES, _SNAPSHOT_BYTES, _INODES = 5_000_000, 12_000_000, 300

_AT_ONCE = 20_000  # records in a transaction
_MADE = 1_700_000_000 * 10**9


@dataclass(frozen=True)
class Shape:
    """How much is in a store; all images have as many layers, the lowest of which is the same."""

    blobs: int
    snapshots: int
    images: int

    @property
    def made(self) -> int:
        """How many images are made: nine of ten get their name."""
        return -(-self.images * 10 // 9)

    @property
    def layers(self) -> int:
        """Layers of an image."""
        return max(1, self.blobs // self.made - 2)

    @property
    def unpacked(self) -> int:
        """How many images are unpacked."""
        return min(self.made, -(-self.snapshots // self.layers))


class Bytes(msgspec.Struct, frozen=True):
    """The bytes of a blob."""

    number: int
    data: bytes


def image_name(number: int) -> str:
    """Return the full name of an image, from 0."""
    return f"registry.example/team{number % 97}/app{number:05}:1.{number % 7}"


def base_layer() -> Digest:
    """Return the digest of the layer that all images share."""
    return digest_of(b"layer base")


def fill(stores: Stores, shape: Shape) -> None:
    """Fill an empty store."""
    stores.snapshotter(BACKEND)  # which makes its folder
    made = _things(shape)
    blob = snapshot = 0
    while batch := list(islice(made, _AT_ONCE)):
        with stores.root.blobs.write() as txn:
            for each in batch:
                if isinstance(each, Bytes):  # as `engine.kv.schema` draws it
                    txn.raw.put(each.number.to_bytes(8, "big") + bytes(4), each.data)
        with stores.root.meta.write() as txn:
            for each in batch:
                if isinstance(each, Snapshot):
                    ledger.put_snapshot(txn, BACKEND, NAMESPACE, each)
                    snapshot = max(snapshot, each.id)
                elif isinstance(each, Blob | Image):
                    ledger.put(txn, NAMESPACE, each)
                    blob = max(blob, each.number) if isinstance(each, Blob) else blob
            COUNTERS.set(txn, "blob", blob)
            COUNTERS.set(txn, "snapshot", snapshot)


def _things(shape: Shape) -> Iterator[Blob | Image | Snapshot | Bytes]:
    numbers = iter(range(1, 1 << 40))
    ids = iter(range(1, 1 << 40))
    diff_base = digest_of(b"diff base")
    yield _blob(next(numbers), base_layer(), _LAYER_BYTES)
    if shape.unpacked:
        yield from _snapshots(ids, [diff_base], 0)
    named = 0
    for number in range(shape.made):
        is_named = number % 10 != 9 and named < shape.images
        own = [b"%d %d" % (number, position) for position in range(1, shape.layers)]
        layers = [base_layer(), *(digest_of(b"layer " + name) for name in own)]
        diffs = [diff_base, *(digest_of(b"diff " + name) for name in own)]
        for digest in layers[1:]:
            yield _blob(next(numbers), digest, _LAYER_BYTES)
        is_unpacked = number < shape.unpacked
        if is_unpacked:
            yield from _snapshots(ids, diffs, 1)
        config, manifest = _documents(layers, diffs, number)
        kept = {labels.snapshot_ref(BACKEND): str(chain_ids(diffs)[-1])} if is_unpacked else {}
        yield from _document(next(numbers), config, kept)
        kept = {f"{labels.GC_REF_CONTENT}.l.{at}": layer for at, layer in enumerate(layers)}
        kept[f"{labels.GC_REF_CONTENT}.config"] = digest_of(config)
        yield from _document(next(numbers), manifest, kept)
        if is_named:
            target = Descriptor(media_type=_MANIFEST, digest=digest_of(manifest), size=len(manifest))
            yield Image(name=image_name(named), target=target, created=_MADE, updated=_MADE)
            named += 1


def _blob(number: int, digest: str, size: int, about: dict[str, str] | None = None) -> Blob:
    return Blob(
        digest=digest, number=number, size=size, created=_MADE, updated=_MADE, labels=about or {}
    )


def _document(
    number: int, data: bytes, about: dict[str, str]
) -> Iterator[Blob | Image | Snapshot | Bytes]:
    yield Bytes(number, data)
    yield _blob(number, digest_of(data), len(data), about)


def _snapshots(ids: Iterator[int], diffs: list[Digest], start: int) -> Iterator[Snapshot]:
    chain = chain_ids(diffs)
    for at in range(start, len(chain)):
        yield Snapshot(
            key=chain[at],
            id=next(ids),
            kind=Kind.COMMITTED,
            parent=chain[at - 1] if at else "",
            created=_MADE,
            updated=_MADE,
            size=_SNAPSHOT_BYTES,
            inodes=_INODES,
            labels={labels.SNAPSHOT_REF: chain[at], labels.DIFF_ID: diffs[at]},
        )


def _documents(layers: Iterable[str], diffs: list[Digest], number: int) -> tuple[bytes, bytes]:
    """Return the config and the manifest of an image."""
    platform = host_platform()
    config = json.dumps(
        {
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {"Cmd": [f"/bin/app{number}"]},
            "rootfs": {"type": "layers", "diff_ids": diffs},
        }
    ).encode()
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": {"mediaType": _CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": _LAYER, "digest": layer, "size": _LAYER_BYTES} for layer in layers],
    }
    return config, json.dumps(manifest).encode()
