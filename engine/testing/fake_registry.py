"""A registry of few words on raw sockets, which does to a client whatever a test tells it to.

Sync; a thread for each connection, all of which end with the block. It serves documents and blobs by
the distribution protocol, with tokens if asked to; a fault takes the place of the answer at a stage.
"""

import base64
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from engine.oci.digest import digest_of

__all__ = ["Asked", "FakeRegistry", "Fault", "cut", "reset", "respond", "response", "stall"]

_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its method, its target and its headers, in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


Fault = Callable[[socket.socket, Asked, bytes], bool]
"""Answer in place of the right answer, which is given; say whether the connection stays."""


def response(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, reason: str = "X"
) -> bytes:
    """Return an answer as bytes, with its length unless `headers` say something about that."""
    lines = {key.lower(): f"{key}: {value}" for key, value in (headers or {}).items()}
    if not {"content-length", "transfer-encoding", "connection"} & lines.keys():
        lines["content-length"] = f"Content-Length: {len(body)}"
    head = "\r\n".join((f"HTTP/1.1 {status} {reason}", *lines.values()))
    return head.encode("latin-1") + b"\r\n\r\n" + body


def respond(answer: bytes, *, close: bool = False) -> Fault:
    """Answer these bytes, whatever they are."""

    def fault(connection: socket.socket, asked: Asked, _good: bytes) -> bool:
        connection.sendall(_for(asked, answer))
        return not close

    return fault


def _for(asked: Asked, answer: bytes) -> bytes:
    """Return an answer, to HEAD without its body."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    return head + gap + (b"" if asked.method == "HEAD" else body)


def _before(good: bytes, body: int | None) -> bytes:
    """Return an answer up to so many bytes of its body, from the end if negative; None: no byte."""
    if body is None:
        return b""
    head, gap, content = good.partition(b"\r\n\r\n")
    return head + gap + content[:body]


def cut(body: int | None = None) -> Fault:
    """Close the connection after so many bytes of the body."""

    def fault(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
        connection.sendall(_before(good, body))
        return False

    return fault


def reset(body: int | None = None) -> Fault:
    """Reset the connection after so many bytes of the body."""

    def fault(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
        connection.sendall(_before(good, body))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return False

    return fault


def stall(body: int | None = None) -> Fault:
    """Send nothing more after so many bytes of the body, until the client leaves."""

    def fault(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
        connection.sendall(_before(good, body))
        with suppress(OSError):
            connection.recv(1)
        return False

    return fault


@dataclass(slots=True)
class _Planned:
    stage: re.Pattern[str]
    fault: Fault
    left: int


@dataclass
class FakeRegistry:
    """Content at `127.0.0.1:port` as long as the block of `running` lasts."""

    content: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Media type and bytes by path below /v2, as `/a/manifests/1`; a test may change them."""
    context: ssl.SSLContext | None = None
    realm: str = ""
    """Where tokens are to be had, `basic` for user and password; without, all may read."""
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = "token-1"
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0
    """Bytes of bodies that were right and sent."""

    def __post_init__(self) -> None:
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def name(self) -> str:
        """The registry as it stands in references."""
        return f"127.0.0.1:{self.port}"

    def put(self, repository: str, kind: str, data: bytes, media_type: str, tag: str = "") -> str:
        """Serve `manifests` or `blobs` by digest, and by a tag; return the digest."""
        digest = digest_of(data)
        for name in filter(None, (digest, tag)):
            self.content[f"/{repository}/{kind}/{name}"] = (media_type, data)
        return digest

    def plan(self, stage: str, fault: Fault, times: int = 1) -> None:
        """Answer so many requests whose `METHOD /path` the pattern is found in by a fault."""
        self._planned.append(_Planned(re.compile(stage), fault, times))

    def count(self, pattern: str) -> int:
        """Return how many requests came whose `METHOD /path` the pattern is found in."""
        return sum(bool(re.search(pattern, f"{one.method} {one.target}")) for one in self.asked)

    @contextmanager
    def running(self) -> Iterator["FakeRegistry"]:
        """Serve for the length of the block."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            acceptor = threading.Thread(target=self._accept, args=(listener,))
            acceptor.start()
            try:
                yield self
            finally:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                acceptor.join()
                with self._lock:
                    for connection in self._open:
                        with suppress(OSError):
                            connection.shutdown(socket.SHUT_RDWR)
                for thread in self._threads:
                    thread.join()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            with self._lock:
                self._open.add(connection)
                self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            # A client that went away is part of many tests.
            with suppress(OSError, ValueError):
                if self.context:
                    connection = self.context.wrap_socket(plain, server_side=True)
                with connection.makefile("rb") as stream:
                    while (asked := _request(stream)) and self._answered(connection, asked):
                        pass
        finally:
            with self._lock:
                self._open.discard(plain)
            with suppress(OSError):
                connection.close()
            plain.close()

    def _answered(self, connection: socket.socket, asked: Asked) -> bool:
        with self._lock:
            self.asked.append(asked)
            fault = self._fault(asked)
        good = _for(asked, self._good(asked))
        if fault:
            return fault(connection, asked, good)
        connection.sendall(good)
        with self._lock:
            self.sent += len(good.partition(b"\r\n\r\n")[2])
        return True

    def _fault(self, asked: Asked) -> Fault | None:
        for planned in self._planned:
            if planned.left and planned.stage.search(f"{asked.method} {asked.target}"):
                planned.left -= 1
                return planned.fault
        return None

    # -- what is right ------------------------------------------------------------------------

    def _good(self, asked: Asked) -> bytes:
        if asked.path == "/token":
            return self._token(asked)
        if self.realm and not self._may_read(asked):
            challenge = 'Basic realm="x"'
            if self.realm != "basic":
                challenge = f'Bearer realm="{self.realm}",service="fake",scope="repository:a:pull"'
            return response(401, _error("UNAUTHORIZED"), {"WWW-Authenticate": challenge})
        path = asked.path.removeprefix("/v2")
        if path not in self.content:
            return response(404, _error("NOT_FOUND"))
        return _serving(*self.content[path], asked)

    def _may_read(self, asked: Asked) -> bool:
        sent = asked.headers.get("authorization", "")
        return sent == (self._basic() if self.realm == "basic" else f"Bearer {self.token}")

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def _token(self, asked: Asked) -> bytes:
        if asked.method == "POST":
            return response(404)
        if self.user and asked.headers.get("authorization") != self._basic():
            return response(401, _error("UNAUTHORIZED"))
        return response(200, json.dumps({"token": self.token, "expires_in": 300}).encode())


def _error(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "as a registry says it"}]}).encode()


def _serving(media_type: str, data: bytes, asked: Asked) -> bytes:
    headers = {"Content-Type": media_type}
    if asked.path.rpartition("/")[0].endswith("/manifests"):
        headers["Docker-Content-Digest"] = digest_of(data)
    status, part = 200, data
    if wanted := _RANGE.match(asked.headers.get("range", "")):
        start = int(wanted[1])
        if start >= len(data):
            return response(416, headers={"Content-Range": f"bytes */{len(data)}"})
        end = min(int(wanted[2] or len(data) - 1) + 1, len(data))
        status, part = 206, data[start:end]
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    if asked.method == "HEAD":
        return response(status, headers={**headers, "Content-Length": str(len(part))})
    return response(status, part, headers)


def _request(stream: BinaryIO) -> Asked | None:
    line = stream.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    headers: dict[str, str] = {}
    while (header := stream.readline().decode("latin-1").strip()) != "":
        key, _, value = header.partition(":")
        headers[key.lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    return Asked(line[0], line[1], headers, body)
