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
from shutil import rmtree
from tempfile import TemporaryDirectory, gettempdir

__all__ = ["KINDS", "MEMORY", "fresh_file_system", "own_mounts", "prefix", "sweep", "unmount"]

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


def unmount(target: Path) -> None:
    """Unmount a folder with what is mounted below, unless an interrupt came before it was mounted."""
    if target.is_mount():
        subprocess.run(["umount", "--recursive", str(target)], check=True)


def sweep() -> None:
    """Remove what is left of this process's: an interrupt may come within the removal of something."""
    for folder in {MEMORY, Path(gettempdir())}:
        for left in folder.glob(f"lamina-*-{os.getpid()}-*"):
            for target in filter(Path.is_dir, left.iterdir()):
                unmount(target)  # or what is removed would be in it
            rmtree(left, ignore_errors=True)


@contextmanager
def fresh_file_system(kind: str = "ext4") -> Iterator[Path]:
    """Mount an empty file system for the length of a block. Needs root, and its mkfs."""
    with TemporaryDirectory(prefix=prefix("fs"), dir=MEMORY) as holder:
        image, target = Path(holder) / "image", Path(holder) / "mnt"
        target.mkdir()
        with image.open("wb") as file:
            file.truncate(_SIZE)
        subprocess.run([*_MAKE[kind], str(image)], check=True)
        try:
            subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
            yield target
        finally:
            unmount(target)  # with what skopeo has mounted below
