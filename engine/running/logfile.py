"""Writes what a container writes into its log: `log`, and before that `log.1`, each bounded.

Sync; one thread. Light: the monitor imports it. A line of the file is the CRI's:
`2026-11-22T06:42:51.000000000Z stdout F text`. `P` in place of `F` says that the line goes on with the
next of the same channel: what comes without a newline is written at once, so that nothing is lost with
the monitor, and a prompt is seen.
"""

import os
import time

__all__ = ["LogFile"]

_SECOND = 10**9
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class LogFile:
    """The log in the current folder. What cannot be written, as on a full disk, is lost."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._file = os.open("log", _FLAGS, 0o600)
        self._size = os.fstat(self._file).st_size
        self._second = -1
        self._date = b""

    def write(self, channel: bytes, data: bytes) -> None:
        """Add what was written to `stdout` or `stderr`."""
        head = b"%s %s " % (self._time(), channel)
        *lines, rest = data.split(b"\n")
        text = b""
        if lines:
            whole = head + b"F "
            text = whole + (b"\n" + whole).join(lines) + b"\n"
        if rest:
            text += b"%sP %s\n" % (head, rest)
        try:
            self._append(text)
        except OSError:
            # The container goes on. Half a line would be taken for the beginning of the next.
            os.ftruncate(self._file, self._size)

    def _append(self, text: bytes) -> None:
        if self._size and self._size + len(text) > self._limit:
            self._rotate()
        view = memoryview(text)
        while view:
            view = view[os.write(self._file, view) :]
        self._size += len(text)

    def _rotate(self) -> None:
        os.rename("log", "log.1")
        fresh = os.open("log", _FLAGS, 0o600)
        os.close(self._file)
        self._file, self._size = fresh, 0

    def _time(self) -> bytes:
        second, rest = divmod(time.time_ns(), _SECOND)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return b"%s.%09dZ" % (self._date, rest)
