"""Builds tar archives byte by byte, and OCI layouts and docker archives of them.

Sync. By hand, because a library would refuse to write what a hostile archive holds.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from engine.oci.digest import digest_of

__all__ = [
    "END",
    "SPARSE_FORMS",
    "archive",
    "docker_archive",
    "layout",
    "member",
    "pack",
    "pax_record",
    "sparse_member",
    "tar_layout",
]

BLOCK = 512
END = bytes(2 * BLOCK)


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def checksummed(header: bytes) -> bytes:
    """Return a header with its checksum put right."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def member(
    name: bytes | str,
    kind: str = "0",
    data: bytes = b"",
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_600_000_000,
    link: bytes | str = b"",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[bytes, bytes] | None = None,
    fields: Mapping[int, bytes] | None = None,
) -> bytes:
    """Return one member: header and padded body, after a pax header if need be.

    `fields` are raw bytes to put at offsets of the header, before its checksum is made.
    """
    raw_name = name.encode() if isinstance(name, str) else name
    raw_link = link.encode() if isinstance(link, str) else link
    records = dict(pax or {})
    if len(raw_name) > 100:
        records.setdefault(b"path", raw_name)
    if len(raw_link) > 100:
        records.setdefault(b"linkpath", raw_link)
    header = bytearray(BLOCK)
    header[0 : len(raw_name[:100])] = raw_name[:100]
    header[100:108] = _octal(mode, 8)
    header[108:116] = _octal(uid & 0o7777777, 8)
    header[116:124] = _octal(gid & 0o7777777, 8)
    header[124:136] = _octal(len(data), 12)
    header[136:148] = _octal(mtime, 12)
    header[156:157] = kind.encode()
    header[157 : 157 + len(raw_link[:100])] = raw_link[:100]
    header[257:265] = b"ustar\x0000"
    header[329:337] = _octal(device[0], 8)
    header[337:345] = _octal(device[1], 8)
    for offset, value in (fields or {}).items():
        header[offset : offset + len(value)] = value
    body = data + bytes(-len(data) % BLOCK)
    before = extended(records) if records else b""
    return before + checksummed(bytes(header)) + body


def pax_record(key: bytes, value: bytes) -> bytes:
    """Return one record of an extended header, its own length in front."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def extended(records: Mapping[bytes, bytes], kind: str = "x") -> bytes:
    """Return a pax header."""
    return member("pax", kind, b"".join(pax_record(k, v) for k, v in records.items()))


SPARSE_FORMS = ("S", "0.0", "0.1", "1.0")


def sparse_member(form: str, name: bytes, size: int, parts: Sequence[tuple[int, bytes]]) -> bytes:
    """Return a sparse file of `size` bytes with the data of `parts`, each at its offset."""
    data = b"".join(part for _, part in parts)
    numbers = [number for offset, part in parts for number in (offset, len(part))]
    words = [b"%d" % number for number in numbers]
    if form == "S":
        return _old_sparse(name, size, numbers, data)
    about = {b"GNU.sparse.realsize" if form == "1.0" else b"GNU.sparse.size": b"%d" % size}
    if form == "1.0":
        lines = b"".join(word + b"\n" for word in (b"%d" % len(parts), *words))
        data = lines + bytes(-len(lines) % BLOCK) + data
        about |= {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}
    else:
        about[b"GNU.sparse.numblocks"] = b"%d" % len(parts)
    if form == "0.1":
        about[b"GNU.sparse.map"] = b",".join(words)
    records = b"".join(pax_record(*record) for record in about.items())
    if form == "0.0":
        keys = (b"GNU.sparse.offset", b"GNU.sparse.numbytes") * len(parts)
        records += b"".join(map(pax_record, keys, words))
        return member("pax", "x", records) + member(name, "0", data)
    records += pax_record(b"GNU.sparse.name", name)
    return member("pax", "x", records) + member("GNUSparseFile.0/x", "0", data)


def _old_sparse(name: bytes, size: int, numbers: Sequence[int], data: bytes) -> bytes:
    fields = [_octal(number, 12) for number in numbers]
    first, rest = fields[:8], fields[8:]
    own = {257: b"ustar  \0", 386: b"".join(first), 482: b"\1" if rest else b"\0", 483: _octal(size, 12)}
    header = member(name, "S", fields={**own, 124: _octal(len(data), 12)})
    further = b""
    while rest:
        now, rest = rest[:42], rest[42:]
        further += b"".join(now).ljust(504, b"\0") + (b"\1" if rest else b"\0").ljust(8, b"\0")
    return header + further + data + bytes(-len(data) % BLOCK)


def archive(*members: bytes) -> bytes:
    """Return a whole archive."""
    return b"".join(members) + END


def pack(data: bytes, compression: str) -> tuple[str, bytes]:
    """Return the suffix of a layer's media type and the packed bytes."""
    if compression == "gzip":
        return "+gzip", gzip.compress(data, 1, mtime=0)
    if compression == "zstd":
        return "+zstd", zstandard.ZstdCompressor().compress(data)
    return "", data


class _Blobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "blobs" / "sha256"
        self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = digest_of(data)
        (self._folder / digest[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}


def layout(
    folder: Path,
    layers: Sequence[bytes],
    *,
    tag: str = "latest",
    compression: str = "gzip",
    config: Mapping[str, Any] | None = None,
    diff_ids: Sequence[str] | None = None,
    platform: Mapping[str, str] | None = None,
) -> Path:
    """Write an image of uncompressed `layers` as an OCI layout, or add it to one; return it."""
    blobs = _Blobs(folder)
    platform = platform or {"architecture": "amd64", "os": "linux"}
    packed = [pack(layer, compression) for layer in layers]
    document = {
        **platform,
        "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest_of(d) for d in layers]},
        **(config or {}),
    }
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": blobs.put(json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [
            blobs.put(data, f"application/vnd.oci.image.layer.v1.tar{suffix}") for suffix, data in packed
        ],
    }
    entry = blobs.put(json.dumps(manifest).encode(), manifest_type)
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    entry["platform"] = dict(platform)
    index_file = folder / "index.json"
    index: dict[str, Any] = (
        json.loads(index_file.read_text())
        if index_file.exists()
        else {"schemaVersion": 2, "manifests": []}
    )
    index["manifests"].append(entry)
    index_file.write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def tar_layout(folder: Path, file: Path) -> Path:
    """Write an OCI layout as an OCI archive."""
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return file


def docker_archive(
    file: Path, layers: Sequence[bytes], tags: Sequence[str], *, architecture: str = "amd64"
) -> Path:
    """Write an image as `docker save` did before it wrote OCI layouts as well."""
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]},
        }
    ).encode()
    names = [f"{digest_of(data)[7:]}/layer.tar" for data in layers]
    config_name = f"{digest_of(config)[7:]}.json"
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": names}]
    with tarfile.open(file, "w") as tar:
        contents = {
            config_name: config,
            **dict(zip(names, layers, strict=True)),
            "manifest.json": json.dumps(manifest).encode(),
        }
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file
