"""Where in a store a container has what it has.

Sync: paths alone, nothing is looked at. A folder is known by the `unique` of its container's record,
which comes first and goes last.

    ROOT/containers/ 0700
      UNIQUE/ 0700
        rootfs/       where its root file system is mounted
        volumes/N/    where the images are that it has as volumes, from 1
"""

import re
from pathlib import Path

from engine.kv.schema import Container

__all__ = ["all_folders", "folder_of", "is_unique", "mount_keys", "target_of"]

_UNIQUE = re.compile(r"[0-9a-f]{16}")


def all_folders(root: Path) -> Path:
    """Return the folder that those of all containers of a store are in."""
    return root / "containers"


def folder_of(root: Path, unique: str) -> Path:
    """Return the folder of a container."""
    return all_folders(root) / unique


def is_unique(name: str) -> bool:
    """Say whether a name may be that of a container's folder."""
    return _UNIQUE.fullmatch(name) is not None


def target_of(folder: Path, number: int) -> Path:
    """Return where, in a container's folder, its root is mounted (0), or a volume (from 1)."""
    return folder / "volumes" / str(number) if number else folder / "rootfs"


def mount_keys(container: Container) -> list[str]:
    """Return the keys of a container's mounts and snapshots: its root's, then its volumes', by path."""
    own = f"container-{container.unique}"
    return [own, *(f"{own}-{number}" for number in range(1, len(container.volumes) + 1))]
