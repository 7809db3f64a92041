"""Finds out what works here by trying it, not by reading version numbers.

Sync.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import EngineError, NotSupported, ResourceExhausted, os_errors
from engine.fs.attributes import folder_descriptor
from engine.mount import Mount, mounted
from engine.snapshots import Probe

__all__ = [
    "by_bind_mount",
    "by_type_in_listing",
    "by_xattr",
    "knows_file_system",
    "try_out",
    "verdict",
]


def knows_file_system(name: str) -> bool:
    """Say whether the kernel knows a file system, by its whole name."""
    lines = Path("/proc/filesystems").read_text(encoding="ascii").splitlines()
    return any(line.split()[-1] == name for line in lines)


def try_out(folder: Path, *attempts: Callable[[Path], None]) -> str:
    """Run attempts, each in a folder of its own below `folder`; return why one failed, or "".

    ResourceExhausted on a full disk, which tells nothing of what works.
    """
    if os.geteuid() != 0:
        return "needs root: the files of an image belong to many users"
    try:
        with os_errors("trial"):
            for number, attempt in enumerate(attempts):
                place = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=folder))
                attempt(place)
    except ResourceExhausted:
        raise
    except EngineError as error:
        return str(error)
    return ""


def by_bind_mount(folder: Path) -> None:
    """Bind-mount a folder, as every backend does for a snapshot without parents."""
    (folder / "tree").mkdir()
    (folder / "bound").mkdir()
    bind = Mount(type="bind", source=str(folder / "tree"), options=["rbind", "ro"])
    with mounted([bind], folder / "bound"):
        pass


def by_xattr(key: str) -> Callable[[Path], None]:
    """Return an attempt to set the xattr `key`."""

    def attempt(folder: Path) -> None:
        with folder_descriptor(folder) as target:
            os.setxattr(target, key, b"y")
            os.removexattr(target, key)

    return attempt


def by_type_in_listing(folder: Path) -> None:
    """Check that readdir tells the type of entries, without which overlay shows whiteouts."""
    (folder / "entry").mkdir()
    with os.scandir(folder) as entries:
        found = next(entry for entry in entries if entry.name == "entry")
    # CPython asks the file itself only where the listing said DT_UNKNOWN: now it cannot.
    (folder / "entry").rmdir()
    if not found.is_dir(follow_symlinks=False):
        raise NotSupported("the file system's listings do not tell types, which overlay needs")


def verdict(unpacking: str, mounting: Callable[[], str]) -> Probe:
    """Return the probe's result: `mounting` is only asked where unpacking works."""
    if unpacking:
        return Probe(unpacks=False, mounts=False, reason=unpacking)
    reason = mounting()
    return Probe(unpacks=True, mounts=not reason, reason=reason)
