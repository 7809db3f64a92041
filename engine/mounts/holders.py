"""Who is in a mount: the processes whose working folder, root, program, open or mapped files are on it.

Sync. By mount ID, which the links of /proc lead to on every file system, also once the mount is out of
sight. What is removed once nobody is found rests on it: a look that ended early is Unavailable, never
"nobody". Processes that /proc does not show here (`hidepid`, another pid namespace) are not seen.
"""

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import Unavailable
from engine.mounts.table import MountID, mount_id

__all__ = ["Holder", "describe", "held", "holders", "occupied"]

_SECONDS = 5.0
_NAMED = 5
_LINKS = {"cwd": "working folder", "root": "root", "exe": "program"}
_FOLDERS = {"fd": "open file", "map_files": "mapped file"}


class Holder(NamedTuple):
    """A process and what it has there."""

    pid: int
    folder: Path
    has: str

    @property
    def name(self) -> str:
        """The program's name."""
        try:
            text = (self.folder / "comm").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "?"
        return text.strip()


def holders(mount: MountID) -> list[Holder]:
    """Return the first processes found in a mount. Unavailable if time was up before there was one."""
    found: list[Holder] = []
    try:
        for holder, on in _scan():
            if _same(on, mount) and holder.pid not in {known.pid for known in found}:
                found.append(holder)
                if len(found) == _NAMED:
                    break
    except Unavailable:
        if not found:
            raise
    return found


def held(mounts: Collection[MountID]) -> set[MountID]:
    """Return those of `mounts` that some process is in, with one look at all processes.

    Unavailable if time was up before all were looked at.
    """
    if not mounts:
        return set()
    return {mount for _, on in _scan() for mount in mounts if _same(on, mount)}


def occupied() -> set[MountID]:
    """Return the mounts that some process is in. Unavailable if time was up before all were seen."""
    return {on for _, on in _scan()}


def _scan() -> Iterator[tuple[Holder, MountID]]:
    end = time.monotonic() + _SECONDS
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for link, what in _links(process):
                if time.monotonic() > end:
                    raise Unavailable(
                        f"who is in a mount cannot be told: looking at all processes takes over "
                        f"{_SECONDS:.0f} s; try again when fewer files are open"
                    )
                yield Holder(int(process.name), process, what), mount_id(link)


def _same(on: MountID, mount: MountID) -> bool:
    return on.unique == mount.unique if mount.unique else 0 != on.id == mount.id


def _links(process: Path) -> Iterator[tuple[Path, str]]:
    for link, what in _LINKS.items():
        yield process / link, what
    for folder, what in _FOLDERS.items():
        try:
            names = os.listdir(process / folder)
        except OSError:  # it ended, or is not ours to look at
            continue
        for name in names:
            yield process / folder / name, what


def describe(found: list[Holder]) -> str:
    """Return holders as the part of a message."""
    if not found:
        return "something that /proc does not show here (another pid namespace, or the kernel itself)"
    return ", ".join(f"{holder.name} (pid {holder.pid}, {holder.has})" for holder in found)
