"""Builds real OCI images from package registries, for tests and benchmarks that need real input.

    python -m benchmarks.corpus OUT [--set small|large] [--compression gzip|zstd|none]

OUT becomes an OCI layout with the tag `latest`; beside it OUT.tar is the same as an OCI archive.

    small  a Debian root file system (175 MB, 7,000 entries), a layer that changes, deletes and
           replaces files and folders of it, and a layer of hard links, xattrs and special files
    large  the Debian root, a Python science stack (800 MB, 39,000 entries) and a Node.js tree
           (530 MB, 34,000 entries): 1.5 GB unpacked

Needs root, GNU tar and debootstrap, for `large` npm too, and pigz or zstd to pack. What was fetched
stays in a cache, so that a second image costs only the packing; the same cache and compression give
the same digests.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["COMPRESSIONS", "SETS", "build"]

CACHE = Path("/var/tmp/lamina-corpus")  # survives a reboot, unlike /tmp

_PYTHON = "numpy scipy pandas matplotlib django sympy scikit-learn jupyterlab"
_NODE = "react react-dom webpack typescript next eslint jest @mui/material lodash date-fns @babel/core"

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class _Packing:
    """How a layer is packed: the suffix of its media type, and a filter from stdin to stdout."""

    suffix: str
    command: tuple[str, ...]


COMPRESSIONS: Mapping[str, _Packing] = {
    "gzip": _Packing("+gzip", ("pigz", "-6", "-n", "-c")),
    "zstd": _Packing("+zstd", ("zstd", "-q", "-3", "-c")),
    "none": _Packing("", ()),
}


def _run(*command: str, folder: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


# -- the folders that layers are made of ------------------------------------------------------


def _debian(top: Path) -> None:
    _run("debootstrap", "--variant=minbase", "bookworm", str(top))
    shutil.rmtree(top / "var/cache/apt/archives", ignore_errors=True)
    for node in (top / "dev").iterdir():
        # Device nodes make debootstrap's result depend on where it ran.
        if not node.is_dir():
            node.unlink()


def _python(top: Path) -> None:
    site = top / "usr/lib/python3/site-packages"
    site.mkdir(parents=True)
    _run(sys.executable, "-m", "pip", "install", "-q", "--target", str(site), *_PYTHON.split())


def _node(top: Path) -> None:
    app = top / "app"
    app.mkdir()
    _run("npm", "init", "-y", folder=app)
    # No scripts of strangers: only their files are wanted.
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
    _run("npm", "install", *quiet, *_NODE.split(), folder=app)


def _changes(top: Path) -> None:
    """Change, hide and replace what the Debian layer has."""
    _write(top / "etc/motd", b"changed in layer 2\n")
    _write(top / "etc/.wh.issue")
    _write(top / "usr/share/doc/.wh..wh..opq")
    _write(top / "usr/share/doc/README", b"only this is left\n")
    _write(top / "var/lib/.wh.dpkg")
    _write(top / "srv", b"a file where the base has a folder\n")
    (top / "opt").mkdir()


def _specials(top: Path) -> None:
    """Make one of each thing that a plain file copy would lose."""
    data = top / "data"
    _write(data / "one", b"x" * 70_000)
    (data / "two").hardlink_to(data / "one")
    os.setxattr(data / "one", "user.note", b"kept")
    _write(data / "suid", b"#!/bin/sh\n")
    os.chown(data / "suid", 1000, 1000)
    (data / "suid").chmod(0o6755)  # after chown, which clears the bits
    os.mkfifo(data / "pipe")
    (data / "link").symlink_to("../etc/motd")
    os.utime(data, ns=(0, 1_234_567_890_123_456_789))


def _write(file: Path, data: bytes = b"") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


SETS: Mapping[str, Mapping[str, Callable[[Path], None]]] = {
    "small": {"debian": _debian, "changes": _changes, "specials": _specials},
    "large": {"debian": _debian, "python": _python, "node": _node},
}
"""The layers of each image, bottom first."""


def _cached(name: str, fill: Callable[[Path], None]) -> Path:
    """Return a layer's folder, filled now unless an earlier run finished it."""
    folder, done = CACHE / name, CACHE / f"{name}.done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(folder)
        done.touch()
    return folder


# -- the image --------------------------------------------------------------------------------


def build(out: Path, image_set: str = "small", compression: str = "gzip") -> Path:
    """Write an image as an OCI layout at `out` and as an archive beside it; return the archive."""
    packing = COMPRESSIONS[compression]
    folders = [_cached(name, fill) for name, fill in SETS[image_set].items()]
    blobs = out / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    packed = [_pack(folder, blobs, packing) for folder in folders]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in packed]},
        "history": [{"created_by": folder.name} for folder in folders],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _put(blobs, config, _CONFIG),
        "layers": [descriptor for _, descriptor in packed],
    }
    entry = _put(blobs, manifest, _MANIFEST)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (out / "index.json").write_text(json.dumps(index))
    (out / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    archive = out.with_name(f"{out.name}.tar")
    _run("tar", "-C", str(out), "-cf", str(archive), "blobs", "index.json", "oci-layout")
    return archive


def _pack(folder: Path, blobs: Path, packing: _Packing) -> tuple[str, dict[str, Any]]:
    """Write a folder as a layer; return its diff ID and its descriptor."""
    plain = blobs / "layer.tar"
    # Access and change times, and tar's pid, would make every run's digests its own.
    pax = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"
    form = ("--format=pax", pax, "--sort=name", "--numeric-owner", "--xattrs")
    _run("tar", *form, "-C", str(folder), "-cf", str(plain), ".")
    diff_id = _digest(plain)
    layer = plain
    if packing.command:
        layer = blobs / "layer.packed"
        with plain.open("rb") as source, layer.open("wb") as target:
            subprocess.run(packing.command, check=True, stdin=source, stdout=target)
        plain.unlink()
    digest = _digest(layer)
    size = layer.stat().st_size
    layer.rename(blobs / digest.removeprefix("sha256:"))
    return diff_id, {"mediaType": _LAYER + packing.suffix, "digest": digest, "size": size}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _put(blobs: Path, document: Mapping[str, object], media_type: str) -> dict[str, Any]:
    data = json.dumps(document).encode()
    name = hashlib.sha256(data).hexdigest()
    (blobs / name).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}


def main() -> None:
    """Build the image that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="image_set", choices=SETS, default="small")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="gzip")
    asked = parser.parse_args()
    if (asked.out / "blobs").exists():
        parser.error(f"{asked.out} holds an image already; name another folder")
    print(build(asked.out, asked.image_set, asked.compression))


if __name__ == "__main__":
    main()
