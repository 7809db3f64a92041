"""Images that must be refused, each made by breaking a good one in one place."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.oci.digest import digest_of
from engine.testing.archives import archive, docker_archive, layout, member, tar_layout

__all__ = ["BAD_IMAGES"]

Manifest = dict[str, Any]

# Layers that no other test imports: what a store has already is not read from an image again.
_LOWER = archive(member("bad/", "5", mode=0o755), member("bad/one", data=b"not to be seen\n" * 40))
_UPPER = archive(member("bad/two", data=b"nor this one\n" * 40))


def _good(folder: Path) -> Path:
    return layout(folder / "image", [_LOWER, _UPPER])


def _rewritten(folder: Path, change: Callable[[Path, Manifest], None]) -> Path:
    """Return an image whose manifest was changed and then named by its true digest."""
    image = _good(folder)
    index = json.loads((image / "index.json").read_text())
    manifest = json.loads(_blob(image, index["manifests"][0]).read_text())
    change(image, manifest)
    index["manifests"][0] |= _put(image, json.dumps(manifest).encode())
    (image / "index.json").write_text(json.dumps(index))
    return image


def _blob(image: Path, descriptor: Mapping[str, Any]) -> Path:
    return image / "blobs" / "sha256" / str(descriptor["digest"]).removeprefix("sha256:")


def _put(image: Path, data: bytes) -> dict[str, Any]:
    about = {"digest": digest_of(data), "size": len(data)}
    _blob(image, about).write_bytes(data)
    return about


def _missing(folder: Path) -> Path:
    return folder / "nothing-here"


def _random_bytes(folder: Path) -> Path:
    file = folder / "image.tar"
    file.write_bytes(bytes(number * number % 251 for number in range(5000)))
    return file


def _empty_file(folder: Path) -> Path:
    file = folder / "image.tar"
    file.touch()
    return file


def _plain_tar(folder: Path) -> Path:
    file = folder / "image.tar"
    file.write_bytes(_LOWER)
    return file


def _plain_folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    (folder / "folder" / "file").touch()
    return folder / "folder"


def _device(_folder: Path) -> Path:
    return Path("/dev/null")


def _cut_archive(folder: Path) -> Path:
    file = tar_layout(_good(folder), folder / "image.tar")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def _cut_gzip(folder: Path) -> Path:
    whole = gzip.compress(tar_layout(_good(folder), folder / "image.tar").read_bytes())
    file = folder / "image.tar.gz"
    file.write_bytes(whole[:-100])
    return file


def _two_members_of_one_name(folder: Path) -> Path:
    file = tar_layout(_good(folder), folder / "image.tar")
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo("index.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    return file


def _index_is_no_json(folder: Path) -> Path:
    image = _good(folder)
    (image / "index.json").write_text("{")
    return image


def _index_is_empty(folder: Path) -> Path:
    image = _good(folder)
    (image / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    return image


def _unknown_layout_version(folder: Path) -> Path:
    image = _good(folder)
    (image / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    return image


def _other_bytes(folder: Path) -> Path:
    def change(image: Path, manifest: Manifest) -> None:
        blob = _blob(image, manifest["layers"][0])
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)

    return _rewritten(folder, change)


def _altered_manifest(folder: Path) -> Path:
    image = _good(folder)
    entry = json.loads((image / "index.json").read_text())["manifests"][0]
    blob = _blob(image, entry)
    blob.write_bytes(
        blob.read_bytes().replace(b'"schemaVersion": 2', b'"schemaVersion":  2')[:-1] + b"}"
    )
    return image


def _wrong_size(folder: Path) -> Path:
    def change(_image: Path, manifest: Manifest) -> None:
        manifest["layers"][1]["size"] += 1

    return _rewritten(folder, change)


def _absent_layer(folder: Path) -> Path:
    def change(image: Path, manifest: Manifest) -> None:
        _blob(image, manifest["layers"][1]).unlink()

    return _rewritten(folder, change)


def _cut_layer(folder: Path) -> Path:
    def change(image: Path, manifest: Manifest) -> None:
        whole = _blob(image, manifest["layers"][1]).read_bytes()
        manifest["layers"][1] |= _put(image, whole[:-20])

    return _rewritten(folder, change)


def _cut_tar(folder: Path) -> Path:
    return layout(folder / "image", [archive(member("file", data=bytes(5000)))[:2000]])


def _layer_of_garbage(folder: Path) -> Path:
    return layout(folder / "image", [_LOWER, b"not an archive at all " * 100])


def _wrong_diff_id(folder: Path) -> Path:
    return layout(folder / "image", [_LOWER, _UPPER], diff_ids=[digest_of(_LOWER), digest_of(b"")])


def _too_few_diff_ids(folder: Path) -> Path:
    return layout(folder / "image", [_LOWER, _UPPER], diff_ids=[digest_of(_LOWER)])


def _unknown_layer_type(folder: Path) -> Path:
    def change(_image: Path, manifest: Manifest) -> None:
        manifest["layers"][0]["mediaType"] = "application/vnd.example.layer+squashed"

    return _rewritten(folder, change)


def _malformed_digest(folder: Path) -> Path:
    def change(_image: Path, manifest: Manifest) -> None:
        manifest["layers"][0]["digest"] = "sha256:../../../../etc/passwd"

    return _rewritten(folder, change)


def _wrong_docker_layer(folder: Path) -> Path:
    file = docker_archive(folder / "image.tar", [_LOWER, _UPPER], ["app:1"])
    data = bytearray(file.read_bytes())
    place = data.index(b"not to be seen")
    data[place : place + 3] = b"NOT"
    file.write_bytes(data)
    return file


def _docker_archive_without_config(folder: Path) -> Path:
    file = folder / "image.tar"
    with tarfile.open(file, "w") as tar:
        data = json.dumps([{"Config": "none.json", "RepoTags": ["app:1"], "Layers": []}]).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return file


BAD_IMAGES: Mapping[Callable[[Path], Path], tuple[int, str]] = {
    _missing: (3, "no such file"),
    _random_bytes: (5, "is not an image archive"),
    _empty_file: (5, "is not an image"),
    _plain_tar: (5, "is not an image"),
    _plain_folder: (5, "is not an image"),
    _device: (2, "neither a folder, a file nor a pipe"),
    _cut_archive: (5, "is not an image archive"),
    _cut_gzip: (5, "cut"),
    _two_members_of_one_name: (5, "two different files"),
    _index_is_no_json: (5, "index.json"),
    _index_is_empty: (5, "holds no image"),
    _unknown_layout_version: (5, "unknown version"),
    _other_bytes: (5, "has digest"),
    _altered_manifest: (5, "descriptor says"),
    _wrong_size: (5, "descriptor says"),
    _absent_layer: (5, "the image is incomplete"),
    _cut_layer: (5, "cut"),
    _cut_tar: (5, "cut"),
    _layer_of_garbage: (5, "layer"),
    _wrong_diff_id: (5, "has digest"),
    _too_few_diff_ids: (5, "diff"),
    _unknown_layer_type: (5, "not a layer type"),
    _malformed_digest: (5, "not a sha256 or sha512 digest"),
    _wrong_docker_layer: (5, "has digest"),
    _docker_archive_without_config: (5, "none.json"),
}
"""How to make each, and the exit code and part of the message that belong to it."""
