"""The files of an image on disk, by name: a folder, or a tar file whose members are found once.

Sync. Names are only looked up, never opened on the host as an archive writes them: a folder is read
below its own descriptor through no link, a member of a tar file is an offset and a size.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from engine import limits
from engine.content.writer import BATCH
from engine.diff import tar
from engine.diff.decompress import SNIFFED, decompressed, sniff
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
from engine.fs.room import Room
from engine.oci.mediatypes import Compression

__all__ = ["FolderSource", "Source", "TarSource", "open_source"]

_HEADERS = 1 << 16  # bytes read at once where only headers are wanted
_COMPARED = 1 << 20  # bytes of two members compared at once
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

    def __init__(self, file: int, report: Callable[[int, int], None]) -> None:
        """Find the members of `file`; `report` is told its size and how far that is, often."""
        self._file = file
        self._report = report
        # Bytes, as a name from an archive may take four times its length as text.
        self._members: dict[bytes, tuple[int, int]] = {}
        self._links: dict[bytes, bytes] = {}
        self._whole = os.fstat(file).st_size
        self._compared = 0
        with os_errors("reading the archive"):
            self._index()

    def _index(self) -> None:
        forward = _Forward(self._file, self._whole, self._report)
        reader = TarReader(forward.pieces(), jump=forward.jump)
        named = 0
        for count, entry in enumerate(reader):
            offset = reader.position
            if count >= limits.ARCHIVE_ENTRIES:
                raise Refused(f"archive has over {limits.ARCHIVE_ENTRIES} files")
            if max(len(entry.name), len(entry.link)) > limits.ARCHIVE_NAME:
                raise Refused(f"archive has a name over {limits.ARCHIVE_NAME} bytes")
            named += len(entry.name) + len(entry.link)
            if named > limits.ARCHIVE_NAMES:
                raise Refused(f"archive has over {limits.ARCHIVE_NAMES} bytes of names")
            if offset + entry.size > self._whole:
                raise _cut_off()
            self._add(entry, offset)

    def _add(self, entry: tar.Entry, offset: int) -> None:
        name = _clean(entry.name)
        if entry.parts is not None:
            raise Refused(f"archive has {printable(name)!r} as a sparse file; pack it without holes")
        if entry.type == tar.FILE:
            if name in self._members or name in self._links:
                self._check_twin(name, offset, entry.size)
            self._members[name] = (offset, entry.size)
        elif entry.type == tar.SYMLINK:
            # Old docker archives link a layer that two images share.
            self._link(name, _clean(_beside(entry.name, entry.link)))
        elif entry.type == tar.HARDLINK:
            self._link(name, _clean(entry.link))

    def _link(self, name: bytes, target: bytes) -> None:
        if name in self._members or self._links.get(name, target) != target:
            raise _two_files(name)
        self._links[name] = target

    def _check_twin(self, name: bytes, offset: int, size: int) -> None:
        old = self._members.get(name)
        if old is None or old[1] != size:
            raise _two_files(name)
        self._compared += size
        if self._compared > limits.ARCHIVE_TWINS:
            raise Refused(f"archive repeats over {limits.ARCHIVE_TWINS} bytes of files under their name")
        if not self._same(old[0], offset, size):
            raise _two_files(name)

    def _same(self, first: int, second: int, size: int) -> bool:
        for at in range(0, size, _COMPARED):
            self._report(self._whole, second + at)
            count = min(_COMPARED, size - at)
            if os.pread(self._file, count, first + at) != os.pread(self._file, count, second + at):
                return False
        return True

    def _find(self, sought: str) -> tuple[int, int] | None:
        name = sought.encode("utf-8", "surrogateescape")
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
                raise _cut_off()
            offset += len(piece)
            size -= len(piece)
            yield piece


def _two_files(name: bytes) -> Refused:
    return Refused(f"archive has two different files {printable(name)!r}")


def _cut_off() -> Refused:
    return Refused("archive is cut off; copy it again")


class _Forward:
    """A file as pieces that can be made to go on further on."""

    def __init__(self, file: int, whole: int, report: Callable[[int, int], None]) -> None:
        self._file = file
        self._whole = whole
        self._report = report
        self._at = 0

    def pieces(self) -> Iterator[bytes]:
        while piece := os.pread(self._file, _HEADERS, self._at):
            self._report(self._whole, self._at)
            self._at += len(piece)
            yield piece

    def jump(self, count: int) -> None:
        self._at += count
        if self._at > self._whole:
            raise _cut_off()


def _clean(name: bytes) -> bytes:
    """Return a member's name as a key: relative, without `.` and `..`."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts)


def _beside(name: bytes, link: bytes) -> bytes:
    return link if link.startswith(b"/") else name.rpartition(b"/")[0] + b"/" + link


@contextmanager
def open_source(path: Path, spool: Path, report: Callable[[int, int], None]) -> Iterator[Source]:
    """Give the files of the folder or archive at `path`, a compressed archive via `spool`.

    While an archive is unpacked and indexed, `report` is told how many bytes there are and are done, and
    may raise to end it. Raises NotFound, PermissionDenied, Refused for what is no archive.
    """
    with os_errors(str(path)):
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        opened = os.open(path, flags)
    try:
        kind = os.fstat(opened).st_mode
        if stat.S_ISDIR(kind):
            yield FolderSource(opened)
        elif stat.S_ISREG(kind):
            with _unpacked(opened, path, spool, report) as file:
                yield _archive(file, path, report)
        else:
            raise InvalidArgument(f"{path} is neither a folder nor a file")
    finally:
        os.close(opened)


def _archive(file: int, path: Path, report: Callable[[int, int], None]) -> TarSource:
    try:
        return TarSource(file, report)
    except Refused as error:
        raise Refused(f"{path} is not an image archive: {error}") from None


@contextmanager
def _unpacked(file: int, path: Path, spool: Path, report: Callable[[int, int], None]) -> Iterator[int]:
    """Give `file` itself, or what it unpacks to in a file without a name."""
    if sniff(os.pread(file, SNIFFED, 0)) is Compression.NONE:
        yield file
        return
    packed = os.fstat(file).st_size
    with os_errors(f"unpacking {path}"), tempfile.TemporaryFile(dir=spool) as whole:
        room = Room(spool)
        for piece in decompressed(iter(lambda: os.read(file, BATCH), b""), limits.IMAGE):
            room.take(len(piece))
            whole.write(piece)
            report(packed, os.lseek(file, 0, os.SEEK_CUR))
        whole.flush()
        yield whole.fileno()
