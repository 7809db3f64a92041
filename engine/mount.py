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

__all__ = [
    "Mount",
    "activate",
    "deactivate",
    "deactivate_below",
    "is_made_of",
    "is_mounted",
    "mounted",
    "uses",
]


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One mount: what mount(8) would be told."""

    type: str
    source: str
    options: list[str]
    target: str = ""
    """A path below the mount point, for a list that mounts more than one thing."""


_FLAGS = {"ro": 0x1, "bind": 0x1000, "rbind": 0x5000}
_RDONLY, _REMOUNT, _BIND = 0x1, 0x20, 0x1000
_NEUTRAL = {"rw"}
_DETACH, _NOFOLLOW = 0x2, 0x8

_PAGE = os.sysconf("SC_PAGE_SIZE")
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
            deactivate(place)
        raise


def _activate_one(mount: Mount, place: Path) -> None:
    flags, data = 0, []
    for option in mount.options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option not in _NEUTRAL:
            data.append(option)
    if flags & _BIND:
        _mount(mount.source, str(place), "", flags & ~_RDONLY, "")
        if flags & _RDONLY:
            # The kernel ignores MS_RDONLY on the first bind call (mount(2)).
            try:
                _mount("", str(place), "", _REMOUNT | _BIND | _RDONLY, "")
            except OSError:
                deactivate(place)
                raise
        return
    joined = ",".join(data)
    if len(joined) < _PAGE - 1:
        _mount(mount.source, str(place), mount.type, flags, joined)
    elif mount.type == "overlay":
        _mount_long_overlay(mount.source, place, flags, data)
    else:
        raise ResourceExhausted(
            f"the options of this {mount.type} mount are over a page ({len(joined)} bytes)"
        )


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
        if flags & _RDONLY:
            _configure(context, _SET_FLAG, "ro", None)
        _configure(context, _CREATE, None, None)
        mount = syscall(_FSMOUNT, ctypes.c_int(context), ctypes.c_uint(_CLOEXEC), ctypes.c_uint(0))
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
    if len(joined) >= _PAGE - 1:
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


def deactivate(target: Path) -> None:
    """Unmount what is on top at `target`, even while files of it are open."""
    if _libc.umount2(os.fsencode(target), _DETACH | _NOFOLLOW) < 0:
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


def _mountinfo() -> list[list[str]]:
    # As bytes and by newline alone: the kernel escapes no other line break that a name may hold.
    table = Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n")
    return [[os.fsdecode(field) for field in line.split(b" ")] for line in table.split(b"\n")]


def _unescape(field: str) -> str:
    # proc(5): space, tab, newline and backslash are written as three octal digits.
    for code in ("\\040", "\\011", "\\012", "\\134"):
        field = field.replace(code, chr(int(code[1:], 8)))
    return field


def is_mounted(target: Path) -> bool:
    """Say whether something is mounted at `target` itself."""
    real = os.path.realpath(target)
    return any(_unescape(fields[4]) == real for fields in _mountinfo())


def deactivate_below(folder: Path) -> None:
    """Unmount everything below `folder`, the newest first."""
    for fields in reversed(_mountinfo()):
        point = _unescape(fields[4])
        if point.startswith(f"{folder}/"):
            deactivate(Path(point))


def uses(folder: Path) -> bool:
    """Say whether a mount that this process sees is made of something below `folder`.

    aufs keeps its branches out of mountinfo, so there only a mount of a single layer is seen.
    """
    try:
        device = folder.stat().st_dev
    except FileNotFoundError:
        return False
    table = _mountinfo()
    return any(_comes_from(fields, folder, device, table) for fields in table)


def is_made_of(target: Path, folder: Path) -> bool:
    """Say whether what is on top at `target` is made of something below `folder`."""
    table = _mountinfo()
    real = os.path.realpath(target)
    device = folder.stat().st_dev
    on_top = [fields for fields in table if _unescape(fields[4]) == real][-1:]
    # aufs does not tell its branches: what someone asks of ours is taken to be ours.
    return any(f[-3] == "aufs" or _comes_from(f, folder, device, table) for f in on_top)


def _comes_from(fields: list[str], folder: Path, device: int, table: list[list[str]]) -> bool:
    # Layers of an overlay stand among its options, or, where those were relative, the folder that
    # they are in stands as the source: then any of them may be meant.
    inside = f"{folder}/"
    source = f"{_unescape(fields[-2])}/"
    if (
        inside in _unescape(fields[-1]) + "/"
        or source == f"{folder.parent}/"
        or source.startswith(inside)
    ):
        return True
    # A bind mount shows a path within the file system that it comes from, which is not ours where
    # the store is itself bind-mounted.
    where = f"{os.major(device)}:{os.minor(device)}"
    if fields[2] != where:
        return False
    within = _path_in_file_system(folder, table)
    root = f"{_unescape(fields[3])}/"
    # In a chroot the mount that the store is on may not be shown: then only the end can be compared.
    return root.startswith(f"{within}/") if within else inside in root


def _path_in_file_system(folder: Path, table: list[list[str]]) -> str | None:
    """Return where `folder` is within its own file system; None if its mount is not shown."""
    best = max(
        (fields for fields in table if folder.is_relative_to(_unescape(fields[4]))),
        key=lambda fields: len(_unescape(fields[4])),
        default=None,
    )
    if best is None:
        return None
    below = folder.relative_to(_unescape(best[4]))
    return os.path.normpath(os.path.join(_unescape(best[3]), below))
