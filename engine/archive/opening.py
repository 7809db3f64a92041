"""A folder, an archive or a pipe, opened as the source of its files.

Sync. An archive that is packed, or comes through a pipe, goes to a file without a name first.
"""

import os
import re
import select
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.archive.packed import HEAD, is_packed, unpacked
from engine.archive.source import FolderSource, Source, TarSource
from engine.errors import InvalidArgument, Refused, os_errors
from engine.fs.room import Room

__all__ = ["Opened", "open_source", "title"]

Progress = Callable[[int, int], None]
"""Told how many bytes there are (0: nobody knows) and are done; may raise to end the work."""

_READ = 1 << 20
_PATIENCE_MS = 100  # a pipe that stalls is looked after so often


@dataclass(frozen=True, slots=True)
class Opened:
    """An open source; `stem` is what a name can be made of, "" where no file lends one."""

    files: Source
    stem: str


def title(origin: Path | int) -> str:
    """Return what a source is called in messages."""
    return "standard input" if isinstance(origin, int) else str(origin)


@contextmanager
def open_source(origin: Path | int, spool: Path, report: Progress) -> Iterator[Opened]:
    """Give the files of the folder, archive or pipe at a path, or behind an open descriptor.

    `report` is called often while an archive is read through. Raises NotFound, PermissionDenied,
    InvalidArgument for what cannot be read, Refused for what is no archive.
    """
    what = title(origin)
    with os_errors(what):
        if isinstance(origin, int):
            opened = os.dup(origin)
        else:
            opened = os.open(origin, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(opened).st_mode
        if stat.S_ISDIR(kind):
            yield Opened(FolderSource(opened), _stem(origin))
        elif stat.S_ISREG(kind) and not os.lseek(opened, 0, os.SEEK_CUR):
            with _whole(opened, what, spool, report) as file:
                yield Opened(_archive(file, what, report), _stem(origin))
        elif stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            with _spooled(opened, what, spool, report) as file:
                yield Opened(_archive(file, what, report), "")
        else:
            raise InvalidArgument(f"{what} is neither a folder, a file nor a pipe")
    finally:
        os.close(opened)


def _stem(origin: Path | int) -> str:
    """Return a name made of a file's: lower case, without endings, only what a name may hold."""
    if isinstance(origin, int):
        return ""
    stem = origin.absolute().name.lower()
    while (short := re.sub(r"\.(tar|tgz|tbz2|txz|gz|zst|xz|bz2|oci|docker)\Z", "", stem)) != stem:
        stem = short
    return re.sub(r"[^a-z0-9]+", "-", stem)[:128].strip("-") or "image"


def _archive(file: int, what: str, report: Progress) -> TarSource:
    try:
        return TarSource(file, report)
    except Refused as error:
        raise Refused(f"{what} is not an image archive: {error}") from None


@contextmanager
def _whole(file: int, what: str, spool: Path, report: Progress) -> Iterator[int]:
    """Give `file` itself, or what it unpacks to."""
    with os_errors(what):
        packed = is_packed(os.pread(file, HEAD, 0))
    if not packed:
        yield file
        return
    with _spooled(file, what, spool, report) as whole:
        yield whole


@contextmanager
def _spooled(file: int, what: str, spool: Path, report: Progress) -> Iterator[int]:
    """Give a file without a name that holds all that can be read from `file`, unpacked."""
    with ExitStack() as stack:
        with os_errors(f"reading {what}"):
            whole = stack.enter_context(tempfile.TemporaryFile(dir=spool, buffering=0))
        arriving, room = _Arriving(file, report), Room(spool)
        try:
            with os_errors(f"reading {what}"):
                for piece in unpacked(arriving.pieces()):
                    room.take(len(piece))
                    _write(whole.fileno(), piece)
                    arriving.tell()  # little that is packed may become much
        except Refused as error:
            raise Refused(f"{what} is not an image archive: {error}") from None
        report(arriving.done, arriving.done)
        yield whole.fileno()


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


class _Arriving:
    """The bytes of a file or a pipe as they come."""

    def __init__(self, file: int, report: Progress) -> None:
        self._file = file
        self._report = report
        self._total = os.fstat(file).st_size  # 0 for a pipe
        self.done = 0

    def tell(self) -> None:
        self._report(self._total, self.done)

    def pieces(self) -> Iterator[bytes]:
        """Yield them; while none come, whoever is told may end the waiting."""
        ready = select.poll()
        ready.register(self._file, select.POLLIN)
        while True:
            while not ready.poll(_PATIENCE_MS):
                self.tell()
            try:
                piece = os.read(self._file, _READ)
            except BlockingIOError:  # another reader of the same pipe was faster
                continue
            if not piece:
                return
            self.done += len(piece)
            self.tell()
            yield piece
