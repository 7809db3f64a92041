"""Images written by hand, right or wrong in one place, and the whole state of a store to compare."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from engine.app import Engine
from engine.importing import ImportResult
from engine.kv.schema import CLOCKS, COUNTERS, TABLES, Image
from engine.oci.digest import digest_of
from engine.stores import Stores
from engine.testing.archives import archive, member, pack
from engine.unpack.workshop import open_workshop

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
COSIGN = "application/vnd.dev.cosign.simplesigning.v1+json"
IN_TOTO = "application/vnd.in-toto+json"
_HELM = "application/vnd.cncf.helm"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
AMD64 = {"architecture": "amd64", "os": "linux"}
ARM64 = {"architecture": "arm64", "os": "linux"}

HELLO = archive(member("hello", data=b"hello\n"))
WORLD = archive(member("world", data=b"world\n" * 1000))

Document = dict[str, Any]


def config_of(layers: Sequence[bytes], **changes: Any) -> Document:
    diff_ids = [digest_of(layer) for layer in layers]
    return {**AMD64, "rootfs": {"type": "layers", "diff_ids": diff_ids}, **changes}


class Files:
    """The files of an OCI layout by name, before they become a folder or a tar file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.entries: list[Document] = []

    def blob(self, data: bytes, media_type: str, **changes: Any) -> Document:
        """Add a blob and return its descriptor; `changes` make the descriptor lie."""
        digest = digest_of(data)
        self.files[f"blobs/sha256/{digest[7:]}"] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **changes}

    def document(self, value: Any, media_type: str, **changes: Any) -> Document:
        return self.blob(json.dumps(value).encode(), media_type, **changes)

    def layers(self, layers: Sequence[bytes], compression: str = "none") -> list[Document]:
        packed = [pack(layer, compression) for layer in layers]
        return [self.blob(data, LAYER + suffix) for suffix, data in packed]

    def image(
        self,
        layers: Sequence[bytes] = (HELLO,),
        /,
        *,
        compression: str = "none",
        config: Document | None = None,
        **changes: Any,
    ) -> Document:
        """Add an image of `layers` and return the descriptor of its manifest."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.document(config or config_of(layers), CONFIG),
            "layers": self.layers(layers, compression),
        }
        return self.document({**manifest, **changes}, MANIFEST)

    def index(self, *entries: Document, **changes: Any) -> Document:
        """Add an index of `entries` and return its descriptor."""
        value = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)}
        return self.document({**value, **changes}, INDEX)

    def chart(self) -> Document:
        """Add a chart as `helm push` writes it, and return the descriptor of its manifest."""
        value = {
            "schemaVersion": 2,
            "config": self.document({"name": "c", "version": "1.0.0"}, f"{_HELM}.config.v1+json"),
            "layers": [self.blob(pack(HELLO, "gzip")[1], f"{_HELM}.chart.content.v1.tar+gzip")],
            "annotations": {"org.opencontainers.image.title": "c"},
        }
        return self.document(value, MANIFEST)

    def signature(self, image: Document) -> Document:
        """Add a signature as cosign writes it: its config is that of an image without a platform."""
        payload = {"critical": {"image": {"docker-manifest-digest": image["digest"]}}, "optional": None}
        layer = self.document(
            payload, COSIGN, annotations={"dev.cosignproject.cosign/signature": "MEU="}
        )
        diff_ids = {"type": "layers", "diff_ids": [layer["digest"]]}
        config = {"architecture": "", "created": "0001-01-01T00:00:00Z", "os": "", "rootfs": diff_ids}
        entry = self.image(config=config, layers=[layer])
        return {**entry, "annotations": {"kind": "dev.cosignproject.cosign/sigs"}}

    def attestation(self, image: Document) -> Document:
        """Add an attestation as buildkit writes it into an index."""
        layer = self.document({"predicateType": "https://slsa.dev/provenance/v0.2"}, IN_TOTO)
        rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
        unknown = {"architecture": "unknown", "os": "unknown"}
        entry = self.image(config={**unknown, "config": {}, "rootfs": rootfs}, layers=[layer])
        annotations = {
            "vnd.docker.reference.digest": image["digest"],
            "vnd.docker.reference.type": "attestation-manifest",
        }
        return {**entry, "annotations": annotations, "platform": unknown}

    def name(self, entry: Document, name: str = "example.org/a:1", **changes: Any) -> "Files":
        """List an entry in `index.json` under a full name."""
        annotations = {"io.containerd.image.name": name}
        return self.list({"annotations": annotations, **entry, **changes})

    def tag(self, entry: Document, tag: str) -> "Files":
        """List an entry in `index.json` under a tag, as umoci and skopeo do."""
        return self.list({**entry, "annotations": {"org.opencontainers.image.ref.name": tag}})

    def list(self, entry: Document) -> "Files":
        """List an entry in `index.json` as it is."""
        self.entries.append(entry)
        return self

    def all(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.entries}
        return {"index.json": json.dumps(index).encode(), **self.files}

    def folder(self, folder: Path) -> Path:
        for name, data in self.all().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def tar(self, file: Path, *more: bytes) -> Path:
        return tar_of(file, self.all(), *more)


def tar_of(file: Path, files: Mapping[str, bytes], *more: bytes) -> Path:
    """Write files, and then members made by hand, as a tar file."""
    members = [member(name, data=data) for name, data in files.items()]
    file.write_bytes(archive(*members, *more))
    return file


def docker_files(
    layers: Sequence[bytes] = (HELLO,),
    *,
    config: Document | None = None,
    entry: Document | None = None,
) -> dict[str, bytes]:
    """Return the files of a docker archive; `entry` replaces fields of its only image."""
    data = json.dumps(config or config_of(layers)).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    image = {"Config": "config.json", "RepoTags": ["example.org/a:1"], "Layers": names, **(entry or {})}
    return {
        "config.json": data,
        **dict(zip(names, layers, strict=True)),
        "manifest.json": json.dumps([image]).encode(),
    }


def import_all(stores: Stores, source: Path | int, **options: Any) -> ImportResult:
    """Import as the engine does, into stores that the test has open."""

    async def run() -> ImportResult:
        async with open_workshop(stores.root) as workshop:
            return await Engine(stores, workshop).import_image(source, **options)

    return trio.run(run)


def import_image(stores: Stores, path: Path, **options: Any) -> list[Image]:
    """Import a source of which nothing fails, and return its images."""
    result = import_all(stores, path, **options)
    assert not result.failed
    return result.images


def records(stores: Stores) -> dict[str, list[tuple[bytes, bytes]]]:
    """Return every record of every table as bytes, but counters and clocks, which only ever rise."""
    found = {}
    with stores.root.meta.read() as txn:
        for name in TABLES:
            if name not in {COUNTERS.name, CLOCKS.name}:
                with txn.raw.cursor(db=txn.databases[name]) as cursor:
                    found[name] = [(bytes(key), bytes(value)) for key, value in cursor]
    return found


def extents(stores: Stores) -> list[tuple[int, int]]:
    """Return blob number and index of every extent that takes up space."""
    with stores.root.blobs.read() as txn, txn.raw.cursor() as cursor:
        keys = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
    return [(int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")) for key in keys]


def state(stores: Stores) -> tuple[object, ...]:
    """Return all that a store holds: records, extents, snapshot folders, and what is in trash."""
    folders = sorted(str(path) for path in stores.root.snapshots.glob("*/*"))
    trash = sorted(str(path) for path in stores.root.trash.iterdir())
    return records(stores), extents(stores), folders, trash
