"""Deletes the folders of removed snapshots: renamed to trash first, nothing that is mounted. Sync."""

import os
from contextlib import suppress
from pathlib import Path

from engine.errors import FailedPrecondition
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import remove_entry
from engine.mounts.table import MountTable
from engine.snapshots import Leftover

__all__ = ["discard", "leftover"]


def discard(folder: Path, away: Path, table: MountTable, until: float) -> None:
    """Delete a folder by way of `away` in the trash."""
    if table.uses(folder) or table.uses(away):
        raise FailedPrecondition("it is mounted")
    with folder_descriptor(away.parent) as trash:
        if os.path.lexists(away):  # of an earlier attempt, or in the way; a link is not followed
            _remove(trash, away, until)
        with suppress(FileNotFoundError):  # another process moves it, or deleted it already
            folder.rename(away)
        hit("trash.moved")
        _remove(trash, away, until)


def _remove(trash: int, away: Path, until: float) -> None:
    with suppress(FileNotFoundError):
        remove_entry(trash, os.fsencode(away.name), until=until)


def leftover(folder: Path, away: Path, error: Exception) -> Leftover:
    """Return what stands for a folder that an error kept from being deleted."""
    reason = error.strerror or "" if isinstance(error, OSError) else str(error)
    return Leftover(str(away if os.path.lexists(away) else folder), reason)
