"""A brand-new file system in memory for each timed run.

On an ext4 that was just used, creating files soon after many were deleted costs many times as much
(inodes freed in the last seconds are passed over), so a second run in one place measures the deletion
of the first. In memory, because the speed of a shared disk is not ours to measure.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["KINDS", "MEMORY", "fresh_file_system", "own_mounts", "prefix"]

MEMORY = Path("/dev/shm")

_SIZE = 10 << 30
_MAKE: Mapping[str, Sequence[str]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q"),
}
KINDS = tuple(_MAKE)

_CLONE_NEWNS = 0x20000
_PRIVATE = 0x4000 | 1 << 18  # MS_REC | MS_PRIVATE


def prefix(what: str, pid: int = 0) -> str:
    """Return how names begin of what a process, or this one, makes for the length of a run."""
    return f"lamina-{what}-{pid or os.getpid()}-"


def own_mounts() -> None:
    """Have what this process and its children mount go with them, even if killed. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise OSError(ctypes.get_errno(), f"mounts of its own: {os.strerror(ctypes.get_errno())}")


@contextmanager
def fresh_file_system(kind: str = "ext4") -> Iterator[Path]:
    """Mount an empty file system for the length of a block. Needs root, and its mkfs."""
    with TemporaryDirectory(prefix=prefix("fs"), dir=MEMORY) as holder:
        image, target = Path(holder) / "image", Path(holder) / "mnt"
        target.mkdir()
        with image.open("wb") as file:
            file.truncate(_SIZE)
        subprocess.run([*_MAKE[kind], str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
        try:
            yield target
        finally:
            # With what skopeo has mounted below.
            subprocess.run(["umount", "--recursive", str(target)], check=True)
