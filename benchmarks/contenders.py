"""The tools that are timed: each takes an OCI archive and an empty folder, and ends unpacked."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LAMINA = (sys.executable, "-m", "engine")


@dataclass(frozen=True)
class Run:
    """What one run took: wall seconds, and the peak of the largest process in bytes."""

    seconds: float
    peak_bytes: int


def timed(*commands: list[str]) -> Run:
    """Run commands one after the other; peaks are those of each process and its children."""
    start = time.perf_counter()
    peak = 0
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        peak = max(peak, usage.ru_maxrss * 1024)
    return Run(time.perf_counter() - start, peak)


def lamina(backend: str) -> Callable[[Path, Path], Run]:
    """Return lamina as two commands, import and unpack."""

    def run(archive: Path, folder: Path) -> Run:
        command = [*LAMINA, "--root", str(folder / "root")]
        return timed(
            [*command, "import", "--no-unpack", "--name", "bench", str(archive)],
            [*command, "unpack", "--snapshotter", backend, "bench"],
        )

    return run


def lamina_at_once(archive: Path, folder: Path) -> Run:
    """Run lamina as one command."""
    command = [*LAMINA, "--root", str(folder / "root")]
    return timed([*command, "import", "--snapshotter", "overlay", str(archive)])


@contextmanager
def _containerd(folder: Path) -> Iterator[list[str]]:
    """Run a containerd of its own; give the beginning of a ctr command."""
    config = folder / "config.toml"
    config.write_text(
        f"""version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/ttrpc.sock"
"""
    )
    client = ["ctr", "-a", f"{folder}/containerd.sock"]
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(["containerd", "-c", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while subprocess.run([*client, "version"], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError("containerd did not start")
            time.sleep(0.05)
        yield client
    finally:
        daemon.terminate()
        daemon.wait()


def containerd(archive: Path, folder: Path) -> Run:
    """Run `ctr images import`, which unpacks with overlayfs; the daemon's start is not timed."""
    with _containerd(folder) as client:
        return timed([*client, "images", "import", str(archive)])


def umoci(archive: Path, folder: Path) -> Run:
    """Run `umoci raw unpack` on the layout beside the archive."""
    return timed(
        ["umoci", "raw", "unpack", "--image", f"{archive.with_suffix('')}:latest", str(folder / "tree")]
    )


CONTENDERS: dict[str, Callable[[Path, Path], Run]] = {
    "lamina import, unpack (overlay)": lamina("overlay"),
    "lamina import (overlay)": lamina_at_once,
    "lamina import, unpack (copy)": lamina("copy"),
    "containerd import (overlayfs)": containerd,
    "umoci raw unpack": umoci,
}
DEFAULT = ("lamina import, unpack (overlay)", "containerd import (overlayfs)")
