"""Packs layers into an OCI layout, and the same as an archive beside it."""

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.stores import host_platform

__all__ = [
    "COMPRESSIONS",
    "LayerMaker",
    "Packed",
    "blobs_of",
    "pack_image",
    "pack_layer",
    "write_layout",
]

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"

LayerMaker = Callable[[Path], None]
"""Writes a layer, not compressed, to a file."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a layer is packed: the suffix of its media type, and a filter from stdin to stdout."""

    suffix: str
    command: tuple[str, ...]


COMPRESSIONS: Mapping[str, Packing] = {
    "gzip": Packing("+gzip", ("pigz", "-6", "-n", "-c")),
    "zstd": Packing("+zstd", ("zstd", "-q", "-3", "-c")),
    "none": Packing("", ()),
}


@dataclass(frozen=True)
class Packed:
    """A layer as an image names it."""

    diff_id: str
    descriptor: Mapping[str, Any]


def pack_image(out: Path, layers: Mapping[str, LayerMaker], compression: str) -> Path:
    """Write an image as an OCI layout at `out` and as an archive beside it; return the archive."""
    blobs_of(out).mkdir(parents=True)
    packed = {name: pack_layer(out, make, compression) for name, make in layers.items()}
    write_layout(out, {"latest": packed})
    archive = out.with_name(f"{out.name}.tar")
    names = ("blobs", "index.json", "oci-layout")
    subprocess.run(["tar", "-C", str(out), "-cf", str(archive), *names], check=True)
    return archive


def blobs_of(out: Path) -> Path:
    """Return the folder of a layout's blobs."""
    return out / "blobs" / "sha256"


def write_layout(out: Path, images: Mapping[str, Mapping[str, Packed]]) -> None:
    """Write the documents of images, by reference, whose layers are in `out` already."""
    entries = []
    for reference, layers in images.items():
        entry = _put_image(blobs_of(out), layers)
        entries.append({**entry, "annotations": {"org.opencontainers.image.ref.name": reference}})
    index = {"schemaVersion": 2, "manifests": entries}
    (out / "index.json").write_text(json.dumps(index))
    (out / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _put_image(blobs: Path, layers: Mapping[str, Packed]) -> dict[str, Any]:
    host = host_platform()
    config = {
        "architecture": host.architecture,
        "os": host.os,
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers.values()]},
        "history": [{"created_by": name} for name in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _put(blobs, config, _CONFIG),
        "layers": [layer.descriptor for layer in layers.values()],
    }
    return _put(blobs, manifest, _MANIFEST)


def pack_layer(out: Path, make: LayerMaker, compression: str) -> Packed:
    """Write a layer into a layout's folder."""
    blobs, packing = blobs_of(out), COMPRESSIONS[compression]
    plain = blobs / "layer.tar"
    make(plain)
    diff_id = _digest(plain)
    layer = plain
    if packing.command:
        layer = blobs / "layer.packed"
        with plain.open("rb") as source, layer.open("wb") as target:
            subprocess.run(packing.command, check=True, stdin=source, stdout=target)
        plain.unlink()
    digest, size = _digest(layer), layer.stat().st_size
    layer.rename(blobs / digest.removeprefix("sha256:"))
    return Packed(diff_id, {"mediaType": _LAYER + packing.suffix, "digest": digest, "size": size})


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _put(blobs: Path, document: Mapping[str, object], media_type: str) -> dict[str, Any]:
    data = json.dumps(document).encode()
    name = hashlib.sha256(data).hexdigest()
    (blobs / name).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}
