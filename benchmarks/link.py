"""A slower way to a server on this machine: `python -m benchmarks.link PORT LATENCY_S BYTES_PER_S`.

It listens on a port of its own, which it prints, and passes bytes on in both directions, each so long
after it came. What comes from the server shares one line: all connections together get no more bytes a
second than that has.
"""

import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

__all__ = ["Line", "forward", "main"]

_PIECE = 256 * 1024
_AHEAD_S = 0.01  # that bytes are taken from the sender before the line has room for them


@dataclass
class Line:
    """So many seconds long, and so many bytes a second wide."""

    latency: float
    rate: float = float("inf")
    _free: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def taken(self, now: float, count: int) -> float:
        """Return when the line has carried bytes that it gets now, after all that it got before."""
        with self._lock:
            self._free = max(self._free, now) + count / self.rate
            return self._free


def forward(source: socket.socket, target: socket.socket, line: Line) -> None:
    """Pass on what one side sends, until it sends no more."""
    on_the_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    arriving = threading.Thread(target=_arrive, args=(on_the_way, target), daemon=True)
    arriving.start()
    with suppress(OSError):
        while data := source.recv(_PIECE):
            carried = line.taken(time.monotonic(), len(data))
            on_the_way.put((carried + line.latency, data))
            _sleep_until(carried - _AHEAD_S)
    on_the_way.put((0.0, b""))
    arriving.join()


def _arrive(on_the_way: SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
    with suppress(OSError):
        while True:
            due, data = on_the_way.get()
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            _sleep_until(due)
            target.sendall(data)


def _sleep_until(due: float) -> None:
    if (wait := due - time.monotonic()) > 0:
        time.sleep(wait)


def _connect(client: socket.socket, port: int, up: Line, down: Line) -> None:
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asking = threading.Thread(target=forward, args=(client, server, up), daemon=True)
        asking.start()
        forward(server, client, down)
        asking.join()


def main(port: int, latency: float, rate: float) -> None:
    """Serve until killed."""
    up, down = Line(latency), Line(latency, rate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_connect, args=(client, port, up, down), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
