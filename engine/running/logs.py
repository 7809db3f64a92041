"""What a container wrote, read from its log: files in the CRI's format, `log` and before it `log.1`.

Sync; safe from any process. Who follows a log looks again from time to time: so he holds up nobody.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from engine.errors import os_errors
from engine.limits import LOG_LINE
from engine.times import moment

__all__ = ["LogFollower", "LogLine", "read_log"]

_PIECE = 256 * 1024
_RECORD = 1 << 20  # beyond that it is none of a monitor's
_CHANNELS = {b"stdout": "stdout", b"stderr": "stderr"}


class LogLine(msgspec.Struct, frozen=True):
    """A line, with the newline that it ends with; of a very long or unfinished one a part, without."""

    at: int
    """When the first of it was written: nanoseconds since the epoch."""
    channel: str
    """`stdout` or `stderr`."""
    data: bytes


class LogFollower:
    """Reads a log, and on where it grows; `close` it in the end.

    Who takes long over it misses what was rotated away meanwhile.
    """

    def __init__(self, folder: Path, *, tail: int | None = None, since: int = 0) -> None:
        """Begin with the last `tail` lines of those from `since` on, else with the first."""
        self._folder = folder
        self._tail = tail
        self._since = since
        self._file = -1
        self._rest = b""
        self._parts: dict[bytes, tuple[int, bytearray]] = {}
        self._second = (b"", 0)

    def more(self) -> Sequence[LogLine]:
        """Return what there is since the last call, a bounded part at once; nothing at the end."""
        with os_errors(f"the log in {self._folder}"):
            if self._tail is None:
                return self._some()
            last: deque[LogLine] = deque(maxlen=self._tail)
            self._tail = None
            while some := self._some():
                last.extend(some)
            return tuple(last)

    def _some(self) -> Sequence[LogLine]:
        found: list[LogLine] = []
        while not found:
            data = os.read(self._file, _PIECE) if self._file >= 0 else b""
            if not data and not self._turn():
                return self._unfinished()
            *records, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _RECORD:
                self._rest = b""
            for record in records:
                found += self._joined(record)
        return found

    def _turn(self) -> bool:
        """Go on where the log goes on after the end of a file; False if it does not."""
        following = self._following()
        if following < 0:
            return False
        # It is not written to any more, but may have been after the last look at it.
        if self._file >= 0 and (last := os.read(self._file, _PIECE)):
            os.close(following)
            self._rest += last
            return True
        self.close()
        self._file, self._rest = following, b""
        return True

    def _following(self) -> int:
        """Open the file after the one that is read, -1 if there is none."""
        here = _inode(self._file)
        newest, older = self._opened("log"), self._opened("log.1")
        # Where what is read was neither of them it has gone, and `log.1` comes after it. There may be no
        # `log`: its monitor is turning it, or was killed at that.
        is_one = self._file >= 0 and here in {_inode(older), _inode(newest)}
        wanted = newest if older < 0 or is_one else older
        for file in {newest, older} - {-1, wanted}:
            os.close(file)
        if wanted >= 0 and _inode(wanted) == here:
            os.close(wanted)
            return -1
        return wanted

    def _opened(self, name: str) -> int:
        try:
            return os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return -1

    def _joined(self, record: bytes) -> Iterator[LogLine]:
        """Take a record; return the line that it ends, or a part of it that is long enough."""
        fields = record.split(b" ", 3)
        if len(fields) < 4 or fields[1] not in _CHANNELS:
            return  # a crash tore it
        date, channel, tag, data = fields
        at, line = self._parts.pop(channel, (self._moment(date), bytearray()))
        line += data
        if tag == b"F":
            line += b"\n"
        elif len(line) < LOG_LINE:
            self._parts[channel] = (at, line)
            return
        if at >= self._since:
            yield LogLine(at, _CHANNELS[channel], bytes(line))

    def _unfinished(self) -> Sequence[LogLine]:
        """Return what there is of lines that do not end."""
        parts, self._parts = self._parts, {}
        return [
            LogLine(at, _CHANNELS[channel], bytes(line))
            for channel, (at, line) in parts.items()
            if at >= self._since
        ]

    def _moment(self, date: bytes) -> int:
        text, rest = date[:19], date[20:29]
        if text != self._second[0]:
            self._second = (text, moment(f"{text.decode('ascii', 'replace')}Z") or 0)
        return self._second[1] + (int(rest) if rest.isdigit() else 0)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _inode(file: int) -> int:
    """Return what tells an open file from others; -1 for none."""
    return os.fstat(file).st_ino if file >= 0 else -1


def read_log(folder: Path, *, tail: int | None = None, since: int = 0) -> Iterator[LogLine]:
    """Iterate over the lines of a container's log: the last `tail` of those from `since` on."""
    with closing(LogFollower(folder, tail=tail, since=since)) as follower:
        while lines := follower.more():
            yield from lines
