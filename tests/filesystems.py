"""File systems in files: what a store may lie on, made for a test and gone after it.

Sync.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.mount import Mount, deactivate, mounted
from tests.conftest import peer

__all__ = ["formatted", "in_memory", "shared_memory"]

# Sparse; xfs takes no less than 300 MiB.
_BYTES = {"btrfs": 256 << 20, "xfs": 320 << 20, "ext4": 64 << 20}
_MAKE = {"btrfs": ["mkfs.btrfs", "-q"], "xfs": ["mkfs.xfs", "-q"], "ext4": ["mkfs.ext4", "-qm0"]}


@contextmanager
def shared_memory() -> Iterator[Path]:
    """Make a folder in memory without mounting anything, for who is not root and needs no whiteouts."""
    shm = Path("/dev/shm")
    with TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None, prefix="lamina-") as folder:
        yield Path(folder)


@contextmanager
def in_memory(folder: Path, mebibytes: int = 512) -> Iterator[Path]:
    """Mount memory at a new folder: what is flushed there takes no time."""
    folder.mkdir()
    memory = Mount(type="tmpfs", source="tmpfs", options=[f"size={mebibytes}m"])
    with mounted([memory], folder):
        yield folder


@contextmanager
def formatted(
    kind: str, image: Path, target: Path, *options: str, make: Sequence[str] = ()
) -> Iterator[Path]:
    """Mount a new file system at a folder; `make` is more for what makes it."""
    program, *words = [*_MAKE[kind], *make]
    with image.open("wb") as file:
        file.truncate(_BYTES[kind])
    subprocess.run([peer(program), *words, image], check=True, capture_output=True)
    given = ",".join(("loop", *options))  # frees the loop device by itself
    subprocess.run(["mount", "-o", given, image, target], check=True)
    try:
        yield target
    finally:
        deactivate(target)
