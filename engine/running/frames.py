"""What goes over a monitor's socket, framed: a byte that says what it is, four of length, then so many.

Pure, and light: the monitor imports it.

Who connects to `attach` in a container's folder is told one thing, when its process ends: `EXIT`, with
the contents of the `exit` file. Who sends `ATTACH` is sent all that it writes from then on (`STDOUT`,
`STDERR`; of a terminal only the former), and may write to it (`STDIN`; without bytes, its end) and
set the size of its terminal (`RESIZE`: rows, columns). A connection that ends without `EXIT` means that
the monitor is gone.

Who starts a container has such a connection from before it starts, and is told of that first: `STARTED`
with the pid, or `FAILED` with what went wrong. Where the job says `attached` he is a client as if he had
sent `ATTACH`. If he leaves before he is told, or says `KILL`, the container is killed.
"""

import struct

__all__ = [
    "ATTACH",
    "EXIT",
    "FAILED",
    "KILL",
    "LARGEST",
    "RESIZE",
    "STARTED",
    "STDERR",
    "STDIN",
    "STDOUT",
    "FrameError",
    "frame",
    "resize",
    "size_of",
    "take",
]

ATTACH, STDIN, RESIZE, KILL = b"a", b"i", b"r", b"k"
STARTED, FAILED, STDOUT, STDERR, EXIT = b"s", b"f", b"o", b"e", b"x"

LARGEST = 1 << 16
"""Bytes in one."""
_HEADER = struct.Struct("!cI")
_SIZE = struct.Struct("!HH")


class FrameError(ValueError):
    """Bytes that are no frame."""


def frame(kind: bytes, data: bytes = b"") -> bytes:
    """Return a frame; longer data goes into several (`LARGEST`)."""
    return _HEADER.pack(kind, len(data)) + data


def take(buffer: bytearray) -> tuple[bytes, bytes] | None:
    """Take the first frame out of what was received: what it is, and its data. None if it is not whole.

    Raises FrameError for one that is too large.
    """
    if len(buffer) < _HEADER.size:
        return None
    kind, length = _HEADER.unpack_from(buffer)
    if length > LARGEST:
        raise FrameError("a frame is too large")
    end = _HEADER.size + length
    if len(buffer) < end:
        return None
    data = bytes(buffer[_HEADER.size : end])
    del buffer[:end]
    return kind, data


def resize(rows: int, columns: int) -> bytes:
    """Return the frame that sets a terminal's size."""
    return frame(RESIZE, _SIZE.pack(min(rows, 0xFFFF), min(columns, 0xFFFF)))


def size_of(data: bytes) -> tuple[int, int]:
    """Return the rows and columns of a `RESIZE`. Raises FrameError."""
    if len(data) != _SIZE.size:
        raise FrameError("a size is four bytes")
    rows, columns = _SIZE.unpack(data)
    return rows, columns
