"""The images that are measured: a corpus by name, or what the path of a layout or an archive holds."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.corpus import COMPRESSIONS, CORPORA, build
from benchmarks.packing import Packed
from engine.diff.decompress import SNIFFED, sniff
from engine.oci.mediatypes import Compression
from engine.stores import host_platform

__all__ = ["Image", "Layer", "image_at", "made_or_found", "packed_layers", "read_image"]


@dataclass(frozen=True)
class Layer:
    """A layer's blob, and how its bytes are packed."""

    path: Path
    compression: Compression

    @property
    def size(self) -> int:
        """Bytes as packed."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Image:
    """An image as a layout and as an archive; `target` is the digest that its name stands for."""

    name: str
    layout: Path
    archive: Path
    tag: str
    target: str
    layers: Sequence[Layer]


def made_or_found(word: str, folder: Path) -> Image:
    """Return what a word of the command line stands for; what is made goes into `folder`."""
    name, _, compression = word.partition(":")
    compression = compression or "gzip"
    if name in CORPORA and compression in COMPRESSIONS:
        layout = folder / f"{name}-{compression}"
        if not layout.with_name(f"{layout.name}.tar").exists():
            print(f"making {name}:{compression}", file=sys.stderr)
            build(layout, name, compression)
        return image_at(f"{name}:{compression}", layout, layout.with_name(f"{layout.name}.tar"))
    path = Path(word)
    if not path.exists():
        raise SystemExit(
            f"{word}: no such file, and none of {' '.join(CORPORA)} "
            f"(each also with {' '.join(f':{kind}' for kind in COMPRESSIONS)})"
        )
    return read_image(path, folder)


def read_image(path: Path, folder: Path) -> Image:
    """Return the image of a layout or an archive; the other one of the two is made in `folder`."""
    other = folder / path.name.removesuffix(".tar")
    archive = path if path.is_file() else other.with_name(f"{other.name}.tar")
    layout = path if path.is_dir() else other
    if path.is_dir():
        subprocess.run(["tar", "-C", str(path), "-cf", str(archive), "."], check=True)
    else:
        layout.mkdir()
        subprocess.run(["tar", "-C", str(layout), "-xf", str(archive)], check=True)
    return image_at(path.name, layout, archive)


def image_at(name: str, layout: Path, archive: Path) -> Image:
    """Return what a layout holds, which is one image, maybe for several platforms."""
    try:
        entries = _document(layout / "index.json")["manifests"]
    except FileNotFoundError:
        raise SystemExit(f"{name}: no OCI layout; `skopeo copy` makes one of other forms") from None
    if len(entries) != 1:
        raise SystemExit(f"{name}: {len(entries)} images; `skopeo copy` makes a layout of one")
    manifest = _chosen(layout, entries[0])
    blobs = [_blob(layout, layer["digest"]) for layer in manifest["layers"]]
    return Image(
        name=name,
        layout=layout,
        archive=archive,
        tag=entries[0].get("annotations", {}).get("org.opencontainers.image.ref.name", ""),
        target=entries[0]["digest"],
        layers=[Layer(blob, _packed(blob)) for blob in blobs],
    )


def packed_layers(image: Image) -> Mapping[str, Packed]:
    """Return the layers as another image can name them too."""
    manifest = _chosen(image.layout, {"digest": image.target})
    diff_ids = _document(_blob(image.layout, manifest["config"]["digest"]))["rootfs"]["diff_ids"]
    pairs = zip(diff_ids, manifest["layers"], strict=True)
    return {diff_id: Packed(diff_id, descriptor) for diff_id, descriptor in pairs}


def _chosen(layout: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest that an entry stands for on this machine."""
    document = _document(_blob(layout, entry["digest"]))
    if "layers" in document:
        return document
    here = host_platform()
    for below in document["manifests"]:
        about = below.get("platform", {})
        if (about.get("os"), about.get("architecture")) == (here.os, here.architecture):
            return _chosen(layout, below)
    raise SystemExit(f"the image has no manifest for {platform.machine()}")


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _packed(blob: Path) -> Compression:
    with blob.open("rb") as file:
        return sniff(file.read(SNIFFED))
