"""A real containerd, started for a test alone.

Sync.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.mount import deactivate
from tests.compat.images import run
from tests.conftest import peer
from tests.processes import until

__all__ = ["Containerd", "running"]

_CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/ttrpc"
[debug]
  level = "error"
"""


@dataclass(frozen=True)
class Containerd:
    """A running containerd and the client that talks to it."""

    folder: Path

    def ctr(self, *words: object) -> str:
        """Run a command of its client."""
        return run(peer("ctr"), "--address", self.folder / "socket", *words)

    @contextmanager
    def mounted(self, image: str, target: Path) -> Iterator[Path]:
        """Mount an image read-only for the length of a block."""
        target.mkdir()
        self.ctr("images", "mount", image, target)
        try:
            yield target
        finally:
            deactivate(target)
            self.ctr("snapshots", "rm", target)


@contextmanager
def running(folder: Path) -> Iterator[Containerd]:
    """Run one for the length of a block, all of it in a new folder."""
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([peer("containerd"), "--config", config], stdout=log, stderr=log)
    try:
        until(lambda: (folder / "socket").exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield Containerd(folder)
    finally:
        process.terminate()
        process.wait(timeout=20)
