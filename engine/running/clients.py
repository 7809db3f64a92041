"""The clients of a monitor: who is told of the end, who is sent the output, who writes to the input.

Sync; one thread. Light: the monitor imports it. The protocol is in `engine.running.frames`.
"""

import os
import socket
from collections.abc import Callable

from engine.limits import CLIENT_BEHIND, CLIENTS
from engine.running.frames import (
    ATTACH,
    EXIT,
    KILL,
    LARGEST,
    RESIZE,
    STDIN,
    FrameError,
    frame,
    size_of,
    take,
)
from engine.running.polling import Polling

__all__ = ["Clients", "Connection"]

_BACKLOG = 128


class Connection:
    """One connection."""

    def __init__(self, connection: socket.socket, *, attached: bool) -> None:
        self.connection = connection
        self.attached = attached
        self.came = bytearray()
        self.to_send = bytearray()
        self.is_paused = False
        self.receive: Callable[[], object] = bool
        self.send_on: Callable[[], object] = bool


class Clients:
    """All of them. One that does not read what it is sent holds up the output, and nothing else."""

    def __init__(
        self,
        polling: Polling,
        stdin: Callable[[bytes], bool],
        resize: Callable[[int, int], object],
        kill: Callable[[], object],
    ) -> None:
        """`stdin` is given what clients write, nothing for its end; it says whether it can take more."""
        self._polling = polling
        self._stdin = stdin
        self._resize = resize
        self._kill = kill
        self._has_told_end = False
        self.first_saw_end = False
        """Whether the client that was there from the start took all output, and how it ended."""
        self._first: Connection | None = None
        self._all: set[Connection] = set()
        self._listening: socket.socket | None = None

    def listen(self) -> None:
        """Take connections at `attach` in the current folder."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.setblocking(False)
        self._listening.bind("attach")
        self._listening.listen(_BACKLOG)
        self._polling.on(self._listening.fileno(), read=self._accept)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor left: on with it when a client leaves
            self._polling.on(self._listening.fileno())
            return
        self.add(connection, attached=False)

    def add(self, connection: socket.socket, *, attached: bool) -> Connection:
        """Take a connection that was made otherwise."""
        connection.setblocking(False)
        client = Connection(connection, attached=attached)
        client.receive = lambda: self._receive(client)
        client.send_on = lambda: self._send_on(client)
        if attached:
            self._first = client
        self._all.add(client)
        self._wait_for(client)
        return client

    @property
    def any_behind(self) -> bool:
        """Say whether the output has to wait for a client."""
        return any(len(client.to_send) > CLIENT_BEHIND for client in self._all)

    @property
    def any_sent_to(self) -> bool:
        """Say whether something is still on its way to a client."""
        return any(client.to_send for client in self._all)

    @property
    def is_first_sent_to(self) -> bool:
        """Say whether something is still on its way to the client that was there from the start."""
        return any(client.to_send for client in self._all if client is self._first)

    def output(self, kind: bytes, data: bytes) -> None:
        """Send on what the container wrote."""
        framed = frame(kind, data)
        for client in [client for client in self._all if client.attached]:
            self.send(client, framed)

    def tell_end(self, data: bytes) -> None:
        """Tell all that the container has ended, and take no more of them."""
        if self._listening is not None:
            os.unlink("attach")
            self._polling.on(self._listening.fileno())
            self._listening.close()
            self._listening = None
        self._has_told_end = True
        framed = frame(EXIT, data)
        for client in list(self._all):
            self.send(client, framed)

    def resume(self) -> None:
        """Hear those again whose input there was no room for."""
        for client in [client for client in self._all if client.is_paused]:
            client.is_paused = False
            self._heed(client)

    def send(self, client: Connection, data: bytes) -> None:
        """Send a frame, at once or when the client takes it."""
        client.to_send += data
        self._send_on(client)

    def _send_on(self, client: Connection) -> None:
        try:
            sent = client.connection.send(client.to_send)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop(client)
            return
        del client.to_send[:sent]
        if self._has_told_end and client is self._first and not client.to_send:
            self.first_saw_end = True
        self._wait_for(client)

    def _wait_for(self, client: Connection) -> None:
        self._polling.on(
            client.connection.fileno(),
            read=None if client.is_paused else client.receive,
            write=client.send_on if client.to_send else None,
        )

    def _receive(self, client: Connection) -> None:
        try:
            data = client.connection.recv(LARGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        client.came += data
        self._heed(client)

    def _heed(self, client: Connection) -> None:
        """Do what a client has asked for."""
        try:
            while not client.is_paused and (taken := take(client.came)):
                kind, data = taken
                if kind == ATTACH:
                    self._attach(client)
                elif kind == KILL:
                    self._kill()
                elif kind == STDIN and client.attached:
                    client.is_paused = not self._stdin(data)
                elif kind == RESIZE and client.attached:
                    self._resize(*size_of(data))
                else:
                    raise FrameError("a client may not say that")
        except FrameError:
            self.drop(client)
            return
        if client in self._all:
            self._wait_for(client)

    def _attach(self, client: Connection) -> None:
        if sum(one.attached for one in self._all) >= CLIENTS:
            raise FrameError("there are too many clients")
        client.attached = True

    def drop(self, client: Connection) -> None:
        """Let go of a client; the container goes on."""
        if client in self._all:
            self._all.remove(client)
            self._polling.on(client.connection.fileno())
            client.connection.close()
            if self._listening is not None:
                self._polling.on(self._listening.fileno(), read=self._accept)
