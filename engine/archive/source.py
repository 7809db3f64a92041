"""The files of an image on disk, by name: a folder, or a tar file whose members are found once.

Sync. Names are only looked up, never opened on the host as an archive writes them: a folder is read
below its own descriptor through no link, a member of a tar file is an offset and a size.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from engine import limits
from engine.content.writer import BATCH
from engine.diff import tar
from engine.diff.decompress import decompressed, sniff
from engine.diff.tar import TarReader
from engine.errors import (
    EngineError,
    InvalidArgument,
    NotFound,
    Refused,
    from_os_error,
    os_errors,
    printable,
)
from engine.fs.kernel import open_beneath
from engine.oci.mediatypes import Compression

__all__ = ["FolderSource", "Source", "TarSource", "open_source"]

_HEADERS = 1 << 16  # bytes read at once where only headers are wanted
_NAME = 1024  # the longest name of a file in a folder
_ASTRAY = {errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG}


class Source(Protocol):
    """Files by name."""

    def size(self, name: str) -> int | None:
        """Return the size of a file, None if there is none of that name."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes. Raises NotFound."""


class FolderSource:
    """The files of a folder."""

    def __init__(self, folder: int) -> None:
        self._folder = folder

    def size(self, name: str) -> int | None:
        """Return the size of a regular file."""
        try:
            with self._open(name) as file:
                return os.fstat(file).st_size
        except NotFound:
            return None

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes in pieces that suit the store."""
        with self._open(name) as file:
            while piece := _read(file, name):
                yield piece

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        if "\0" in name or len(name) > _NAME:
            raise Refused(f"{printable(name)!r} is no name for a file")
        try:
            file = open_beneath(self._folder, os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise _from_open(error, name) from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise NotFound(f"{printable(name)} is not a regular file")
            yield file
        finally:
            os.close(file)


def _read(file: int, name: str) -> bytes:
    with os_errors(f"image file {printable(name)}"):
        return os.read(file, BATCH)


def _from_open(error: OSError, name: str) -> EngineError:
    if error.errno in _ASTRAY:
        return Refused(f"image file {printable(name)!r} leads through a link or out of the image")
    if error.errno == errno.ENOTDIR:
        return NotFound(f"the image has no file {printable(name)!r}")
    return from_os_error(error, f"image file {printable(name)}")


class TarSource:
    """The members of a tar file."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._index()

    def _index(self) -> None:
        whole = os.fstat(self._file).st_size
        forward = _Forward(self._file)
        reader = TarReader(forward.pieces(), jump=forward.jump)
        for count, entry in enumerate(reader):
            offset = reader.position
            if count >= limits.ARCHIVE_ENTRIES:
                raise Refused(f"archive has over {limits.ARCHIVE_ENTRIES} files")
            if len(entry.name) + len(entry.link) > 2 * limits.ARCHIVE_NAME:
                raise Refused(f"archive has a name over {limits.ARCHIVE_NAME} bytes")
            if offset + entry.size > whole:
                raise Refused("archive is cut off; copy it again")
            name = _clean(entry.name)
            if entry.type == tar.FILE:
                if name in self._members or name in self._links:
                    self._check_twin(name, offset, entry.size)
                self._members[name] = (offset, entry.size)
            elif entry.type == tar.SYMLINK:
                # Old docker archives link a layer that two images share.
                self._link(name, _clean(_beside(entry.name, entry.link)))
            elif entry.type == tar.HARDLINK:
                self._link(name, _clean(entry.link))

    def _link(self, name: str, target: str) -> None:
        if name in self._members or self._links.get(name, target) != target:
            raise _two_files(name)
        self._links[name] = target

    def _check_twin(self, name: str, offset: int, size: int) -> None:
        old = self._members.get(name)
        if old is None or old[1] != size or not self._same(old[0], offset, size):
            raise _two_files(name)

    def _same(self, first: int, second: int, size: int) -> bool:
        step = 1 << 20
        return all(
            os.pread(self._file, min(step, size - at), first + at)
            == os.pread(self._file, min(step, size - at), second + at)
            for at in range(0, size, step)
        )

    def _find(self, name: str) -> tuple[int, int] | None:
        for _ in range(limits.ARCHIVE_LINKS):
            if name in self._members:
                return self._members[name]
            if name not in self._links:
                return None
            name = self._links[name]
        raise Refused(f"archive has links in a circle at {printable(name)!r}")

    def size(self, name: str) -> int | None:
        """Return the size of a member."""
        found = self._find(name)
        return found[1] if found else None

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a member's bytes in pieces that suit the store."""
        found = self._find(name)
        if found is None:
            raise NotFound(f"archive has no file {printable(name)!r}")
        offset, size = found
        while size:
            with os_errors("reading the archive"):
                piece = os.pread(self._file, min(BATCH, size), offset)
            if not piece:
                raise Refused("archive is cut off; copy it again")
            offset += len(piece)
            size -= len(piece)
            yield piece


def _two_files(name: str) -> Refused:
    return Refused(f"archive has two different files {printable(name)!r}")


class _Forward:
    """A file as pieces that can be made to go on further on."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._at = 0

    def pieces(self) -> Iterator[bytes]:
        with os_errors("reading the archive"):
            while piece := os.pread(self._file, _HEADERS, self._at):
                self._at += len(piece)
                yield piece

    def jump(self, count: int) -> None:
        self._at += count


def _clean(name: bytes) -> str:
    """Return a member's name as a key: relative, without `.` and `..`."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in {b"", b"."}:
            parts.append(part)
    return os.fsdecode(b"/".join(parts))


def _beside(name: bytes, link: bytes) -> bytes:
    return link if link.startswith(b"/") else name.rpartition(b"/")[0] + b"/" + link


@contextmanager
def open_source(path: Path, spool: Path) -> Iterator[Source]:
    """Give the files of the folder or archive at `path`, a compressed archive via `spool`.

    Raises NotFound, PermissionDenied, Refused for what is no archive.
    """
    with os_errors(str(path)):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        opened = os.open(path, flags)
    try:
        kind = os.fstat(opened).st_mode
        if stat.S_ISDIR(kind):
            yield FolderSource(opened)
        elif stat.S_ISREG(kind):
            with _unpacked(opened, path, spool) as file:
                yield _archive(file, path)
        else:
            raise InvalidArgument(f"{path} is neither a folder nor a file")
    finally:
        os.close(opened)


def _archive(file: int, path: Path) -> TarSource:
    try:
        return TarSource(file)
    except Refused as error:
        raise Refused(f"{path} is not an image archive: {error}") from None


@contextmanager
def _unpacked(file: int, path: Path, spool: Path) -> Iterator[int]:
    """Give `file` itself, or what it unpacks to in a file without a name."""
    if sniff(os.pread(file, 10, 0)) is Compression.NONE:
        yield file
        return
    with os_errors(f"unpacking {path}"), tempfile.TemporaryFile(dir=spool) as whole:
        for piece in decompressed(iter(lambda: os.read(file, BATCH), b""), Compression.ANY):
            whole.write(piece)
        whole.flush()
        yield whole.fileno()
