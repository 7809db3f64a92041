"""The tools beside which lamina is timed, as someone would run them. A tool that is missing is left out.

A name with `+sync` is the tool and a flush of the file system that it wrote to; by themselves they all
leave that to the kernel.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.contenders import Contender, Ready, Unable
from benchmarks.group import Command, Failed, Group, Step
from benchmarks.images import Image, Layer
from engine.oci.mediatypes import Compression

__all__ = ["PEERS", "SYNC", "containerd", "peers", "version"]

SYNC = "+sync"
_STARTING_S = 20.0


@dataclass(frozen=True)
class Peer:
    """A tool: the program that it needs, how it says its version, and how it does each stage."""

    program: str
    stages: Mapping[str, Ready]
    version: Sequence[str] = ("--version",)


def peers(word: str, stages: Sequence[str]) -> Iterator[Contender]:
    """Yield what a tool takes part in. Unable if it is not there."""
    name = word.removesuffix(SYNC)
    peer = PEERS[name]
    if not shutil.which(peer.program):
        raise Unable(f"no program {peer.program}")
    for stage, ready in peer.stages.items():
        if stage in stages:
            found = Contender(word, stage, ready)
            yield replace(found, ready=_flushed(ready)) if name != word else found


def version(name: str) -> str:
    """Return the version that a tool says it has."""
    peer = PEERS[name.removesuffix(SYNC)]
    said = subprocess.run([peer.program, *peer.version], capture_output=True, text=True, check=True)
    found = re.search(r"\d+\.\S+", said.stdout)
    return found[0] if found else said.stdout.strip()


def _flushed(ready: Ready) -> Ready:
    @contextmanager
    def flushed(image: Image, folder: Path, group: Group) -> Iterator[Sequence[Step]]:
        with ready(image, folder, group) as steps:
            yield [*steps, [["sync", "-f", str(folder)]]]

    return flushed


# -- an inflater piped into tar, layer by layer -------------------------------------------------


def _tar(*program: str) -> Ready:
    @contextmanager
    def ready(image: Image, folder: Path, _: Group) -> Iterator[Sequence[Step]]:
        steps = []
        for number, layer in enumerate(image.layers):
            target = folder / str(number)
            target.mkdir()
            steps.append([*_inflater(layer), [*program, "-C", str(target), "-f", "-"]])
        yield steps

    return ready


def _inflater(layer: Layer) -> Sequence[Command]:
    if layer.compression is Compression.GZIP:
        igzip = ["igzip"] if shutil.which("igzip") else [sys.executable, "-m", "isal.igzip"]
        return [[*igzip, "-dc", str(layer.path)]]
    if layer.compression is Compression.ZSTD:
        return [["zstd", "-q", "-dc", str(layer.path)]]
    return [["cat", str(layer.path)]]


# -- tools that know images ---------------------------------------------------------------------


@contextmanager
def _umoci(image: Image, folder: Path, _: Group) -> Iterator[Sequence[Step]]:
    if any(layer.compression is Compression.ZSTD for layer in image.layers):
        raise Unable("it does not know zstd")
    if not image.tag:
        raise Unable("it wants a tag, and the image has none")
    yield [[["umoci", "raw", "unpack", "--image", f"{image.layout}:{image.tag}", str(folder / "tree")]]]


@contextmanager
def _podman(image: Image, folder: Path, _: Group) -> Iterator[Sequence[Step]]:
    places = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]
    # Else it keeps a database in the home folder, of where its root is.
    places += ["--tmpdir", str(folder / "tmp"), "--events-backend", "none"]
    driver = ["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]
    config = folder / "containers.conf"
    config.write_text('[engine]\nlock_type = "file"\n')  # else they stay in /dev/shm
    program = ["env", f"CONTAINERS_CONF={config}", "podman"]
    yield [[[*program, *places, *driver, "load", "-q", "-i", str(image.archive)]]]


@contextmanager
def _skopeo(image: Image, folder: Path, _: Group) -> Iterator[Sequence[Step]]:
    store = f"[overlay@{folder}/root+{folder}/run]"
    target = f"containers-storage:{store}localhost/bench:latest"
    yield [[["skopeo", "copy", "-q", "--insecure-policy", f"oci-archive:{image.archive}", target]]]


_CONTAINERD = """version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/ttrpc.sock"
[debug]
  level = "error"
"""


@contextmanager
def containerd(folder: Path, group: Group) -> Iterator[Command]:
    """Run a containerd of its own; give the beginning of a ctr command."""
    config = folder / "config.toml"
    config.write_text(_CONTAINERD.format(folder=folder))
    client = ["ctr", "-a", f"{folder}/containerd.sock"]
    daemon = group.start(["containerd", "-c", str(config)])
    try:
        deadline = time.monotonic() + _STARTING_S
        while subprocess.run([*client, "version"], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or daemon.poll() is not None:
                raise Failed("containerd did not start")
            time.sleep(0.05)
        yield client
    finally:
        daemon.terminate()
        daemon.wait()


@contextmanager
def _ctr_unpack(image: Image, folder: Path, group: Group) -> Iterator[Sequence[Step]]:
    with containerd(folder, group) as client:
        group.run([[*client, "images", "import", "--no-unpack", str(image.archive)]])
        yield [[[*client, "snapshots", "unpack", image.target]]]


@contextmanager
def _ctr_import(image: Image, folder: Path, group: Group) -> Iterator[Sequence[Step]]:
    with containerd(folder, group) as client:
        yield [[[*client, "images", "import", str(image.archive)]]]


PEERS: Mapping[str, Peer] = {
    "ctr": Peer("ctr", {"unpack": _ctr_unpack, "import": _ctr_import}),
    "tar": Peer("tar", {"unpack": _tar("tar", "-x", "--numeric-owner", "--xattrs", "-p")}),
    "bsdtar": Peer("bsdtar", {"unpack": _tar("bsdtar", "-x", "--numeric-owner", "--xattrs", "-p")}),
    "umoci": Peer("umoci", {"unpack": _umoci}),
    "podman": Peer("podman", {"import": _podman}),
    "skopeo": Peer("skopeo", {"import": _skopeo}),
}
