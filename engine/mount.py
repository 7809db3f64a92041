"""Mounts: values that a backend returns, and the calls that make and undo them.

Sync. A `Mount` is containerd's: type, source, options, and a target below the mount point. Nobody
passes an "overlay object" around; a runtime may mount these values by itself.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engine.errors import ResourceExhausted, from_os_error, os_errors
from engine.fs.kernel import syscall
from engine.mounts.options import (
    BIND,
    BIND_FLAGS,
    KEPT_BY_BINDS,
    RDONLY,
    REMOUNT,
    attributes,
    aufs_pieces,
    flags_and_data,
)
from engine.mounts.table import MountTable

__all__ = [
    "Mount",
    "activate",
    "deactivate",
    "deactivate_below",
    "grows_with",
    "mounted",
    "with_options",
    "writes_to",
]


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One mount: what mount(8) would be told."""

    type: str
    source: str
    options: list[str]
    target: str = ""
    """A path below the mount point, for a list that mounts more than one thing."""


_DETACH, _NOFOLLOW = 0x2, 0x8

_LIMIT = os.sysconf("SC_PAGE_SIZE") - 2  # all that mount(2) copies, less its NUL and one to spare
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_CLOEXEC, _EMPTY_PATH = 0x1, 0x4
_CLONE_FS = 0x200

_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        os.fsencode(data) if data else None,
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def activate(mounts: Sequence[Mount], target: Path) -> None:
    """Mount a list at `target`, or nothing of it. Raises PermissionDenied and others."""
    done: list[Path] = []
    try:
        for mount in mounts:
            place = target / mount.target.lstrip("/") if mount.target else target
            with os_errors(f"mounting {mount.type} on {place}"):
                _activate_one(mount, place)
            done.append(place)
    except BaseException:
        for place in reversed(done):
            deactivate(place, lazy=True)
        raise


def _activate_one(mount: Mount, place: Path) -> None:
    flags, data = flags_and_data(mount.options)
    if flags & BIND:
        _bind(mount.source, place, flags)
        return
    joined = ",".join(data)
    if len(os.fsencode(joined)) <= _LIMIT:
        _mount(mount.source, str(place), mount.type, flags, joined)
    elif mount.type == "overlay":
        _mount_long_overlay(mount.source, place, flags, data)
    elif mount.type == "aufs":
        _mount_long_aufs(mount.source, place, flags, data)
    else:
        raise ResourceExhausted(
            f"the options of this {mount.type} mount are over a page ({len(joined)} bytes)"
        )


def _bind(source: str, place: Path, flags: int) -> None:
    _mount(source, str(place), "", flags & BIND_FLAGS, "")
    wanted = flags & ~BIND_FLAGS
    if wanted:
        # The kernel ignores all other flags on the first bind call, and the second clears what it is
        # not told (mount(2)): what the source's own mount has stays.
        try:
            now = os.statvfs(place).f_flag
            kept = sum(flag for shown, flag in KEPT_BY_BINDS if now & shown)
            _mount("", str(place), "", REMOUNT | BIND | kept | wanted, "")
        except OSError:
            deactivate(place, lazy=True)
            raise


def _mount_long_aufs(source: str, place: Path, flags: int, data: list[str]) -> None:
    """Mount the first branches of an aufs, and append the others a page at a time."""
    first, *more = aufs_pieces(data, _LIMIT)
    _mount(source, str(place), "aufs", flags, first)
    try:
        for piece in more:
            _mount(source, str(place), "aufs", flags | REMOUNT, piece)
    except OSError:
        deactivate(place, lazy=True)
        raise


def _mount_long_overlay(source: str, place: Path, flags: int, data: list[str]) -> None:
    """Mount an overlay whose options exceed a page, which is all that mount(2) copies."""
    try:
        _mount_by_parts(source, place, flags, data)
    except OSError:
        # Linux before 6.7 knows no `lowerdir+`.
        _mount_relative(place, flags, data)


def _mount_by_parts(source: str, place: Path, flags: int, data: list[str]) -> None:
    """Give one layer at a time to the new mount API (fsopen(2), since Linux 5.2)."""
    context = syscall(_FSOPEN, b"overlay", ctypes.c_uint(_CLOEXEC))
    try:
        _configure(context, _SET_STRING, "source", source)
        for option in data:
            key, equals, value = option.partition("=")
            if key == "lowerdir":
                for layer in value.split(":"):
                    _configure(context, _SET_STRING, "lowerdir+", layer)
            elif equals:
                _configure(context, _SET_STRING, key, value)
            else:
                _configure(context, _SET_FLAG, key, None)
        if flags & RDONLY:
            _configure(context, _SET_FLAG, "ro", None)
        _configure(context, _CREATE, None, None)
        how = ctypes.c_uint(attributes(flags))
        mount = syscall(_FSMOUNT, ctypes.c_int(context), ctypes.c_uint(_CLOEXEC), how)
        try:
            syscall(
                _MOVE_MOUNT,
                ctypes.c_int(mount),
                b"",
                ctypes.c_int(-100),
                os.fsencode(place),
                ctypes.c_uint(_EMPTY_PATH),
            )
        finally:
            os.close(mount)
    finally:
        os.close(context)


def _configure(context: int, command: int, key: str | None, value: str | None) -> None:
    syscall(
        _FSCONFIG,
        ctypes.c_int(context),
        ctypes.c_uint(command),
        key.encode() if key else None,
        os.fsencode(value) if value is not None else None,
        ctypes.c_int(0),
    )


def _mount_relative(place: Path, flags: int, data: list[str]) -> None:
    """Shorten the layers to names below their common folder, and mount from there."""
    lowers = next(option for option in data if option.startswith("lowerdir=")).partition("=")[2]
    folder = os.path.commonpath(lowers.split(":"))
    short = ":".join(os.path.relpath(lower, folder) for lower in lowers.split(":"))
    joined = ",".join(f"lowerdir={short}" if o.startswith("lowerdir=") else o for o in data)
    if len(os.fsencode(joined)) > _LIMIT:
        raise ResourceExhausted(f"too many layers for one overlay mount ({len(joined)} bytes)")

    def from_folder() -> None:
        # A current folder of its own: without this the whole process would move.
        if _libc.unshare(_CLONE_FS) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        os.chdir(folder)
        # The folder as source, so that the mount table still tells what this is made of.
        _mount(folder, str(place.absolute()), "overlay", flags, joined)

    _in_own_thread(from_folder)


def _in_own_thread(work: Callable[[], None]) -> None:
    failure: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def deactivate(target: Path, *, lazy: bool = False) -> None:
    """Unmount what is on top at `target`. FailedPrecondition while it is in use.

    A lazy one is only taken out of sight: whoever is in it goes on, and no table shows it any more.
    """
    if _libc.umount2(os.fsencode(target), (_DETACH if lazy else 0) | _NOFOLLOW) < 0:
        code = ctypes.get_errno()
        raise from_os_error(OSError(code, os.strerror(code)), f"unmounting {target}")


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Mount a list at `target` for the length of a block."""
    activate(mounts, target)
    try:
        yield target
    finally:
        for mount in reversed(mounts):
            deactivate(target / mount.target.lstrip("/") if mount.target else target)


def deactivate_below(folder: Path) -> None:
    """Take everything mounted below `folder` out of sight, the newest first."""
    for entry in reversed(MountTable.read_own().own.entries):
        if entry.point.startswith(f"{folder}/"):
            deactivate(Path(entry.point), lazy=True)


def with_options(mounts: Sequence[Mount], options: Sequence[str]) -> list[Mount]:
    """Return mounts with more options, each after those that it has."""
    return [msgspec.structs.replace(m, options=[*m.options, *options]) for m in mounts]


def writes_to(mounts: Sequence[Mount]) -> Path | None:
    """Return the folder that takes what is written through mounts; None where nothing can be."""
    return next(grows_with(mounts), None)


def grows_with(mounts: Sequence[Mount]) -> Iterator[Path]:
    """Yield the folders that grow with what is written through mounts, the one that has it first."""
    for mount in mounts:
        if "ro" in mount.options:
            continue
        if mount.type == "bind":
            yield Path(mount.source)
        for option in mount.options:
            if option.startswith("upperdir="):
                yield Path(option.removeprefix("upperdir="))
            elif option.startswith("workdir="):
                yield Path(option.removeprefix("workdir="))
            elif option.startswith("br:"):
                yield Path(option[3:].partition("=")[0])
