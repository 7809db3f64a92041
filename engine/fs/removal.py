"""Remove a tree that an image made, without following anything out of it.

Sync. Everything goes by descriptor and name; a folder is opened only if it is no symlink and no
mount point, so that a forgotten mount is an error (EXDEV) and never loses what is mounted.
"""

import math
import os
import threading
import time
from contextlib import suppress

from engine.errors import EngineError
from engine.fs.kernel import open_beneath

__all__ = ["UNFINISHED", "Unfinished", "remove_entry", "remove_tree"]

UNFINISHED = "not finished yet"

_FAILURES = 1000  # after so many nothing will go: a disk that fails, a file system that is read-only


def remove_entry(folder: int, name: bytes, *, until: float = math.inf) -> bool:
    """Remove `name` in `folder`, a whole tree if it is one; say whether it was a directory.

    FileNotFoundError if it is not there; else as `remove_tree`.
    """
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        remove_tree(folder, name, until=until)
        return True
    return False


class Unfinished(EngineError):
    """The time given for a removal is over; the next one goes on where it stopped."""


def remove_tree(folder: int, name: bytes, *, until: float = math.inf) -> None:
    """Remove the directory `name` in `folder` and all below it; nothing if it is not there.

    What resists (an immutable file, a mount) does not keep the rest: the first such error comes last.
    Another process may be removing the same tree. Raises Unfinished at `until`, in monotonic seconds.
    """
    try:
        top = open_beneath(folder, name, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        failures = _empty(top, until)
    finally:
        os.close(top)
    if failures:
        raise failures[0]
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=folder)


def _empty(top: int, until: float) -> list[OSError]:
    """Remove all below the open directory `top`, level by level; return what went wrong.

    No recursion: the depth is the image's choice. Instead, what lies two levels down is moved up.
    """
    fresh = 0
    failures: list[OSError] = []
    stuck: set[bytes] = set()
    while True:
        folders = [name for name in _unlink_files(top, failures, until) if name not in stuck]
        if not folders or len(failures) > _FAILURES:
            return failures
        for name in folders:
            _check_time(until)
            try:
                child = open_beneath(top, name, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    for below in _unlink_files(child, failures, until):
                        _check_time(until)
                        fresh += 1
                        _hoist(child, below, top, fresh)
                finally:
                    os.close(child)
                os.rmdir(name, dir_fd=top)
            except FileNotFoundError:
                continue
            except OSError as error:
                failures.append(error)
                stuck.add(name)


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise Unfinished(UNFINISHED)


def _hoist(source: int, name: bytes, top: int, number: int) -> None:
    while True:
        target = b".lamina-removing-%d-%d" % (threading.get_native_id(), number)
        try:
            os.stat(target, dir_fd=top, follow_symlinks=False)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                os.rename(name, target, src_dir_fd=source, dst_dir_fd=top)
            return
        number += 1_000_000_007


def _unlink_files(folder: int, failures: list[OSError], until: float) -> list[bytes]:
    """Remove all but directories from `folder`; return the names of those."""
    folders: list[bytes] = []
    # btrfs lists what there was when this was last done, and scandir does it only when it ends.
    os.lseek(folder, 0, os.SEEK_SET)
    with os.scandir(folder) as entries:
        names = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in names:
        if is_folder:
            folders.append(name)
            continue
        _check_time(until)
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(error)
    return folders
