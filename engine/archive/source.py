"""The files of an image on disk, by name: a folder, or a tar file whose members are found once.

Sync. Names are only looked up, never opened on the host as an archive writes them: a folder is read
below its own descriptor, through links that stay there; a member of a tar file is an offset and a size,
of a sparse one the parts that are there, between which its bytes are zero.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from engine import limits
from engine.content.growing import BATCH
from engine.diff import tar
from engine.diff.sparse import Parts
from engine.diff.tar import TarReader
from engine.errors import EngineError, Refused, from_os_error, os_errors, printable
from engine.fs.kernel import BENEATH, open_beneath

__all__ = ["FolderSource", "Source", "TarSource"]

_HEADERS = 1 << 16  # bytes read at once where only headers are wanted
_COMPARED = 1 << 20  # bytes of two members compared at once
_ASTRAY = {errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG}


class Source(Protocol):
    """Files by name."""

    def size(self, name: str) -> int | None:
        """Return the size of a file, None if there is none of that name."""

    def read(self, name: str, piece: int = BATCH) -> Iterator[bytes]:
        """Yield a file's bytes in pieces of that size. Raises Refused if there is none."""


class FolderSource:
    """The files of a folder."""

    def __init__(self, folder: int) -> None:
        self._folder = folder

    def size(self, name: str) -> int | None:
        """Return the size of a regular file."""
        with self._open(name) as file:
            return None if file is None else os.fstat(file).st_size

    def read(self, name: str, piece: int = BATCH) -> Iterator[bytes]:
        """Yield a file's bytes, in pieces that suit the store."""
        with self._open(name) as file:
            if file is None:
                raise _absent(name)
            while data := _read(file, name, piece):
                yield data

    @contextmanager
    def _open(self, name: str) -> Iterator[int | None]:
        """Give a regular file, None where there is none."""
        path = os.fsencode(name)
        if b"\0" in path or len(path) > limits.ARCHIVE_FOLDER_NAME:
            raise Refused(f"{printable(name)!r} is no name for a file")
        try:
            # O_NONBLOCK, because opening a pipe would wait for ever.
            flags = os.O_RDONLY | os.O_NONBLOCK
            file = open_beneath(self._folder, path, flags, BENEATH)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        except OSError as error:
            raise _from_open(error, name) from error
        try:
            yield file if stat.S_ISREG(os.fstat(file).st_mode) else None
        finally:
            os.close(file)


def _read(file: int, name: str, count: int) -> bytes:
    with os_errors(f"image file {printable(name)}"):
        return os.read(file, count)


def _from_open(error: OSError, name: str) -> EngineError:
    if error.errno in _ASTRAY:
        return Refused(f"image file {printable(name)!r} leads out of the image, or by links in a circle")
    return from_os_error(error, f"image file {printable(name)}")


def _absent(name: str) -> Refused:
    return Refused(f"there is no file {printable(name)!r}; the image is incomplete, copy it again")


class TarSource:
    """The members of a tar file."""

    def __init__(self, file: int, report: Callable[[int, int], None]) -> None:
        """Find the members of `file`; `report` is told its size and how far that is, often."""
        self._file = file
        self._report = report
        # Bytes, as a name from an archive may take four times its length as text.
        self._members: dict[bytes, _Member] = {}
        self._links: dict[bytes, bytes] = {}
        self._whole = os.fstat(file).st_size
        self._compared = 0
        self._spread = self._parts = 0  # bytes and parts of sparse members
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
            self._add(entry, _Member(offset, entry.size, entry.parts))
        self._report(self._whole, self._whole)

    def _add(self, entry: tar.Entry, member: "_Member") -> None:
        name = _clean(entry.name)
        if member.offset + member.stored > self._whole:
            raise _cut_off()
        if entry.type == tar.FILE:
            if member.parts is not None:
                self._check_sparse(member.size, len(member.parts) // 2)
            if name in self._members or name in self._links:
                self._check_twin(name, member)
            self._members[name] = member
        elif entry.type == tar.SYMLINK:
            # Old docker archives link a layer that two images share.
            self._link(name, _clean(_beside(entry.name, entry.link)))
        elif entry.type == tar.HARDLINK:
            self._link(name, _clean(entry.link))

    def _link(self, name: bytes, target: bytes) -> None:
        if name in self._members or self._links.get(name, target) != target:
            raise _two_files(name)
        self._links[name] = target

    def _check_sparse(self, size: int, parts: int) -> None:
        self._spread += size
        self._parts += parts
        if self._spread > limits.IMAGE:
            raise Refused(f"archive has sparse files of over {limits.IMAGE} bytes")
        if self._parts > limits.SPARSE_PARTS:
            raise Refused(f"archive has sparse files of over {limits.SPARSE_PARTS} parts")

    def _check_twin(self, name: bytes, member: "_Member") -> None:
        old = self._members.get(name)
        if old is None or (old.size, old.parts) != (member.size, member.parts):
            raise _two_files(name)
        self._compared += member.stored
        if self._compared > limits.ARCHIVE_TWINS:
            raise Refused(f"archive repeats over {limits.ARCHIVE_TWINS} bytes of files under their name")
        if not self._same(old.offset, member.offset, member.stored):
            raise _two_files(name)

    def _same(self, first: int, second: int, size: int) -> bool:
        for at in range(0, size, _COMPARED):
            self._report(self._whole, second + at)
            count = min(_COMPARED, size - at)
            if os.pread(self._file, count, first + at) != os.pread(self._file, count, second + at):
                return False
        return True

    def _find(self, sought: str) -> "_Member | None":
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
        return found.size if found else None

    def read(self, name: str, piece: int = BATCH) -> Iterator[bytes]:
        """Yield a member's bytes, in pieces that suit the store."""
        found = self._find(name)
        if found is None:
            raise _absent(name)
        for offset, size in found.runs():
            while size:
                count = min(piece, size)
                data = bytes(count) if offset is None else self._stored(offset, count)
                offset = None if offset is None else offset + len(data)
                size -= len(data)
                yield data

    def _stored(self, offset: int, count: int) -> bytes:
        with os_errors("reading the archive"):
            data = os.pread(self._file, count, offset)
        if not data:
            raise _cut_off()
        return data


class _Member(NamedTuple):
    """A file in an archive: where what is stored of it begins, its size, of a sparse one its parts."""

    offset: int
    size: int
    parts: Parts | None

    @property
    def stored(self) -> int:
        return self.size if self.parts is None else sum(self.parts[1::2])

    def runs(self) -> Iterator[tuple[int | None, int]]:
        """Yield where each run of its bytes is in the archive, None for a hole, and how long it is."""
        parts = iter((0, self.size) if self.parts is None else self.parts)
        done, place = 0, self.offset
        for start, length in zip(parts, parts, strict=True):
            yield None, start - done
            yield place, length
            done, place = start + length, place + length
        yield None, self.size - done


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
