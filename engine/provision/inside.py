"""Looking into a root file system that a stranger made, and making folders there.

Sync; safe from any thread. Nothing is opened by a path of the host's: always below a descriptor of the
root file system, to which links are those of the container (openat2, RESOLVE_IN_ROOT) or are looked at
one by one; never through one of /proc's, never into another file system. Nothing but regular files is
opened to be read: a FIFO would wait, a device may do anything.

A path that is given to a runtime has no link in it, so that it is no matter what that makes of links:
`resolve` returns it as it is in the root file system.
"""

import errno
import os
import posixpath
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine import limits
from engine.errors import EngineError, FailedPrecondition, Refused, from_os_error, os_errors, printable
from engine.fs.kernel import IN_ROOT, LINK_FREE, open_beneath

__all__ = [
    "Inside",
    "Owner",
    "check_folders",
    "check_no_links",
    "make_file",
    "make_folder",
    "open_rootfs",
    "read_file",
    "resolve",
]

_REAL = ("dev", "etc", "proc", "run", "sys", "tmp")
_KERNELS = frozenset({"dev", "proc", "sys"})
"""Folders that a runtime mounts on: what an image has there nobody sees, and what is mounted there has
links out of the container (`/proc/self/fd`)."""

Owner = tuple[int, int] | None


class Inside(NamedTuple):
    """A path in a root file system without a link in it."""

    path: str
    cover: str = ""
    """What it is or is below, if that is covered by a mount: the rest of the path was not looked at."""


@contextmanager
def open_rootfs(rootfs: Path) -> Iterator[int]:
    """Open a root file system, only to look below it, for the length of a block."""
    with os_errors(f"root file system {rootfs}"):
        root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield root
    finally:
        os.close(root)


def check_folders(root: int) -> None:
    """Raise Refused unless each folder that runtimes mount on or write in is one, or is not there."""
    for name in _REAL:
        mode = _mode(root, name)
        if mode and not stat.S_ISDIR(mode):
            raise Refused(f"/{name} of the image is not a folder; nothing can be run in it safely")


def read_file(root: int, path: str, limit: int) -> bytes:
    """Return the bytes of a small file, none if it is not there; links lead within the root file system.

    Raises Refused for what is not a regular file, or over `limit` bytes.
    """
    what = f"{path} of the image"
    try:
        found = open_beneath(root, os.fsencode(path), os.O_PATH, IN_ROOT)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _refused(error, what) from error
    try:
        about = os.fstat(found)
        if not stat.S_ISREG(about.st_mode):
            raise Refused(f"{what} is not a regular file")
        if about.st_size > limit:
            raise Refused(f"{what} is over {limit} bytes")
        with os_errors(what), open(f"/proc/self/fd/{found}", "rb", opener=_opener) as file:
            return file.read(limit)
    finally:
        os.close(found)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def resolve(root: int, path: str, what: str, covered: Collection[str] = ()) -> Inside:
    """Return `path` with its links resolved as a process of the container would; it need not be there.

    What is mounted on one of `covered` (resolved paths) hides what the image has there. Raises Refused,
    naming `what`, for a path that ends at or below /dev, /proc or /sys, unless that is covered, and for
    one that goes through a file or in a circle of links.
    """
    path = posixpath.normpath(path)
    if "\0" in path or len(os.fsencode(path)) > limits.INSIDE_PATH:
        raise Refused(f"{what} {printable(path)!r} is not a path")
    found: list[str] = []
    left = path.split("/")[::-1]
    for _ in range(limits.INSIDE_STEPS):
        if not left:
            break
        name = left.pop()
        if name == "..":
            found = found[:-1]  # `/..` is `/`
        elif name not in {"", "."}:
            found.append(name)
            if _joined(found) in covered:
                return _below(found, left, what)
            target = _link(root, found, what)
            if target is not None:
                found = [] if target.startswith("/") else found[:-1]
                left += target.split("/")[::-1]
    else:
        raise Refused(f"{what} {printable(path)!r} goes through too many links")
    if found and found[0] in _KERNELS:
        raise Refused(f"{what} {printable(path)!r} is at or below /{found[0]}, which is the kernel's")
    return Inside(_checked(_joined(found), what))


def _below(found: list[str], left: list[str], what: str) -> Inside:
    rest = [name for name in reversed(left) if name not in {"", "."}]
    if ".." in rest:
        raise Refused(f"{what} goes by a link through what is mounted on {printable(_joined(found))!r}")
    return Inside(_checked(_joined([*found, *rest]), what), _joined(found))


def _joined(names: list[str]) -> str:
    return "/" + "/".join(names)


def _checked(path: str, what: str) -> str:
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise Refused(f"{what} leads to {printable(os.fsencode(path))!r}, which is not UTF-8") from None
    if length > limits.INSIDE_PATH:
        raise Refused(f"{what} leads to {printable(path)!r}, which is too long a path")
    return path


def _link(root: int, names: list[str], what: str) -> str | None:
    """Return where a link leads; None for anything else, and for what is not there."""
    try:
        found = open_beneath(root, os.fsencode("/".join(names)), os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(error, f"{what} by way of {printable(_joined(names))!r}") from error
    try:
        if not stat.S_ISLNK(os.fstat(found).st_mode):
            return None
        return os.fsdecode(os.readlink(b"", dir_fd=found))
    finally:
        os.close(found)


def _refused(error: OSError, what: str) -> EngineError:
    """Return Refused for what the root file system is to blame for."""
    if error.errno in {errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG, errno.ENOTDIR}:
        return Refused(f"{what} cannot be reached: {(error.strerror or '').lower()}")
    return from_os_error(error, what)


def _mode(root: int, path: str) -> int:
    """Return of what type and mode something is, 0 if it is not there; no link is followed."""
    try:
        found = open_beneath(root, os.fsencode(path), os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _refused(error, f"{printable(path)!r} of the image") from error
    try:
        return os.fstat(found).st_mode
    finally:
        os.close(found)


def make_folder(root: int, path: str, what: str, owner: Owner = None) -> None:
    """Make a folder, and those above it, at a path as `resolve` returns it; it may be there.

    What is made belongs to `owner`, user and group, or else to this process. Raises Refused where
    something else is in the way, FailedPrecondition if it is not there and nothing can be written.
    """
    os.close(_folder(root, path, what, owner))


def _folder(root: int, path: str, what: str, owner: Owner) -> int:
    """Open a folder to look below it; made if need be."""
    above = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        for name in filter(None, path.split("/")):
            with _making(path, what):
                below = _subfolder(above, name, owner)
            os.close(above)
            above = below
    except BaseException:
        os.close(above)
        raise
    return above


def _subfolder(above: int, name: str, owner: Owner) -> int:
    try:
        return open_beneath(above, os.fsencode(name), os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(name, 0o755, dir_fd=above)
    except FileExistsError:
        # Someone was first; if it is a link, opening it fails.
        return open_beneath(above, os.fsencode(name), os.O_PATH | os.O_DIRECTORY)
    made = open_beneath(above, os.fsencode(name), os.O_RDONLY | os.O_DIRECTORY)
    _settle(made, 0o755, owner)
    return made


def make_file(root: int, path: str, what: str, owner: Owner = None) -> None:
    """Make an empty file, as `make_folder` does a folder, to mount one on."""
    mode = _mode(root, path.lstrip("/"))
    if mode:
        if stat.S_ISDIR(mode):
            raise Refused(f"{what} {printable(path)!r} is a folder in the image, and has to be a file")
        return
    folder, name = posixpath.split(path)
    above = _folder(root, folder, what, owner)
    try:
        with _making(path, what):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            made = os.open(name, flags, 0o644, dir_fd=above)
            _settle(made, 0o644, owner)
            os.close(made)
    finally:
        os.close(above)


def _settle(made: int, mode: int, owner: Owner) -> None:
    os.fchmod(made, mode)  # whatever the umask
    if owner:
        os.fchown(made, *owner)


@contextmanager
def _making(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise FailedPrecondition(
                f"{what} {printable(path)!r} is not in the image, and its root file system is read-only"
            ) from error
        raise _refused(error, f"{what} {printable(path)!r}") from error


def check_no_links(source: str, rest: str, what: str) -> None:
    """Raise Refused for a link or a file in the way from `source`, a folder of the host's, to `rest`.

    What is not there is no matter: a runtime makes it.
    """
    with os_errors(source):
        top = os.open(source, os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_beneath(top, os.fsencode(rest), os.O_PATH, LINK_FREE))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _refused(error, f"{what} {printable(rest)!r} below {source}") from error
    finally:
        os.close(top)
