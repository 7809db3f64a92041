"""Makes the images that tests and benchmarks work on, real ones and made-up ones.

    python -m benchmarks corpus OUT [--set NAME] [--compression gzip|zstd|none]

OUT becomes an OCI layout with the tag `latest`; beside it OUT.tar is the same as an OCI archive.

    small         a Debian root file system (175 MB, 7,000 entries), a layer that changes, deletes and
                  replaces files and folders of it, and a layer of hard links, xattrs and special files
    large         the Debian root, a Python science stack (800 MB, 39,000 entries) and a Node.js tree
                  (530 MB, 34,000 entries): 1.5 GB unpacked
    one-file      1 GB in one file
    many-files    100,000 small files in one layer
    big-layer     one layer of 1 GB in 40,000 files
    equal-layers  32 layers of one size, 1 GB together
    deep          128 layers

The first two come from package registries and need root, GNU tar and debootstrap, for `large` npm too.
What was fetched stays in a cache, so that a second image costs only the packing; the same cache and
compression give the same digests. The others need nothing. All need pigz or zstd to pack.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.packing import COMPRESSIONS, LayerMaker, pack_image
from benchmarks.synthetic import SHAPES, made_layers

__all__ = ["COMPRESSIONS", "CORPORA", "SETS", "build"]

CACHE = Path("/var/tmp/lamina-corpus")  # survives a reboot, unlike /tmp

_PYTHON = "numpy scipy pandas matplotlib django sympy scikit-learn jupyterlab"
_NODE = "react react-dom webpack typescript next eslint jest @mui/material lodash date-fns @babel/core"


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

CORPORA = (*SETS, *SHAPES)


def build(out: Path, name: str = "small", compression: str = "gzip") -> Path:
    """Write an image as an OCI layout at `out` and as an archive beside it; return the archive."""
    return pack_image(out, _layers(name), compression)


def _layers(name: str) -> Mapping[str, LayerMaker]:
    if name in SHAPES:
        return made_layers(SHAPES[name])
    folders = {layer: _cached(layer, fill) for layer, fill in SETS[name].items()}
    return {layer: partial(_archive, folder) for layer, folder in folders.items()}


def _archive(folder: Path, plain: Path) -> None:
    # Access and change times, and tar's pid, would make every run's digests its own.
    pax = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"
    form = ("--format=pax", pax, "--sort=name", "--numeric-owner", "--xattrs")
    _run("tar", *form, "-C", str(folder), "-cf", str(plain), ".")


def main(arguments: Sequence[str]) -> int:
    """Build the image that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="image_set", choices=CORPORA, default="small")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="gzip")
    asked = parser.parse_args(arguments)
    if (asked.out / "blobs").exists():
        parser.error(f"{asked.out} holds an image already; name another folder")
    print(build(asked.out, asked.image_set, asked.compression))
    return 0
