"""What a host may do, at each step of bringing an image in: what comes of it, and what is left.

One row for each behaviour, one letter for each step: the token, the tag, the manifest, the config and
the layer. Whatever comes of it, no other host sees who we are, hosts are asked a bounded number of
times, and nothing is left but what the next attempt goes on with.
"""

import gzip
import random
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import trio

from engine import limits
from engine.errors import NotFound, PermissionDenied, Refused, Unavailable
from engine.registry.client import Access, open_client
from engine.registry.credentials import Credential
from engine.registry.fetching import Fetcher, Sought
from engine.registry.lanes import Lanes
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.testing.fake_registry import (
    Asked,
    FakeRegistry,
    Fault,
    cut,
    reset,
    respond,
    response,
    stall,
)
from tests.registry.asking import HURRIED, QUICK, Served

NOISE = random.Random("noise").randbytes(100_000)
STAGES = ("token", "tag", "manifest", "config", "layer")
KINDS = {"U": Unavailable, "R": Refused, "N": NotFound, "P": PermissionDenied}
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = rb"Content-Length: (\d+)"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def answered(status: int, **headers: str) -> Fault:
    return respond(response(status, b"no", {key.replace("_", "-"): headers[key] for key in headers}))


def made(change: Callable[[bytes, bytes], bytes], *, close: bool = False) -> Fault:
    """Answer what a function makes of the right header and body."""

    def fault(connection: socket.socket, asked: Asked, good: bytes) -> bool:
        head, _, body = good.partition(b"\r\n\r\n")
        head, gap, body = change(head, body).partition(b"\r\n\r\n")
        connection.sendall(head + gap + (b"" if asked.method == "HEAD" else body))
        return not close

    return fault


def headed(pattern: bytes, by: bytes, *, close: bool = False) -> Fault:
    """Answer rightly but for something in the header."""
    return made(lambda head, body: re.sub(pattern, by, head) + b"\r\n\r\n" + body, close=close)


def for_ever(beginning: bytes, piece: bytes) -> Fault:
    """Send as long as the client listens."""

    def fault(connection: socket.socket, _asked: Asked, _good: bytes) -> bool:
        connection.sendall(beginning)
        with suppress(OSError):
            while True:
                connection.sendall(piece)
        return False

    return fault


def redirected(to: str, status: int = 307) -> Fault:
    """Lead to a place; `{target}` in it is what was asked for."""

    def fault(connection: socket.socket, asked: Asked, _good: bytes) -> bool:
        location = to.replace("{target}", asked.target)
        connection.sendall(response(status, headers={"Location": location}))
        return True

    return fault


def chunks(body: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n0\r\n\r\n" % (len(body), extension, body)


def within_the_header(connection: socket.socket, _asked: Asked, _good: bytes) -> bool:
    connection.sendall(OK + b"Content-")
    with suppress(OSError):
        connection.recv(1)
    return False


def half(connection: socket.socket, asked: Asked, good: bytes) -> bool:
    return cut((len(good.partition(b"\r\n\r\n")[2]) + 1) // 2)(connection, asked, good)


def after(before: bytes) -> Fault:
    """Answer rightly after something else."""

    def fault(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
        connection.sendall(before + good)
        return True

    return fault


def in_chunks(change: Callable[[bytes], bytes], *, close: bool = False) -> Fault:
    """Answer rightly, but for a body in chunks."""

    def chunked(head: bytes, body: bytes) -> bytes:
        return re.sub(LENGTH, b"Transfer-Encoding: chunked", head) + b"\r\n\r\n" + change(body)

    return made(chunked, close=close)


def headed_twice(connection: socket.socket, asked: Asked, good: bytes) -> bool:
    both = rb"Transfer-Encoding: chunked\r\nContent-Length: %d" % len(good.partition(b"\r\n\r\n")[2])
    change = made(lambda head, body: re.sub(LENGTH, both, head) + b"\r\n\r\n" + chunks(body))
    return change(connection, asked, good)


def twice_packed(head: bytes, body: bytes) -> bytes:
    packed = gzip.compress(body)
    head = re.sub(LENGTH, b"Content-Encoding: gzip\r\nContent-Length: %d" % len(packed), head)
    return head + b"\r\n\r\n" + packed


AT_ALL = "UUUUU"
ROWS: Sequence[tuple[str, Fault, str]] = [
    # How it ends.
    ("reset before a byte", reset(), AT_ALL),
    ("closed before a byte", cut(), AT_ALL),
    ("closed within the header", made(lambda head, _: head[:30], close=True), AT_ALL),
    ("reset after the header", reset(0), "U.UUU"),
    ("closed in the middle", half, "U.UU."),
    ("reset before the last byte", reset(-1), "U.UUU"),
    ("reset after the last byte", reset(1 << 30), "....."),
    ("closed after the last byte", cut(1 << 30), "....."),
    ("silent within the header", within_the_header, AT_ALL),
    ("silent before the last byte", stall(-1), "U.UUU"),
    # Headers.
    ("10^5 headers", respond(OK + b"a: b\r\n" * 100_000), AT_ALL),
    ("10 MB of headers", respond(OK + (b"a: " + b"b" * 1000 + b"\r\n") * 10_000), AT_ALL),
    ("a header for ever", for_ever(OK + b"a: ", b"b" * 65536), AT_ALL),
    ("1xx for ever", for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), AT_ALL),
    ("1xx once", after(b"HTTP/1.1 103 X\r\n\r\n"), "....."),
    ("a length too small", headed(LENGTH, b"Content-Length: 5"), "RRRRR"),
    ("no length", headed(LENGTH, b"Connection: close", close=True), "....."),
    ("no length, cut", made(lambda head, body: re.sub(LENGTH, b"Connection: close", head)
     + b"\r\n\r\n" + body[:-1], close=True), "RRRRU"),
    ("two lengths", headed(LENGTH, rb"\g<0>\r\nContent-Length: 7"), AT_ALL),
    ("a list of lengths", headed(LENGTH, rb"\g<0>, 7"), AT_ALL),
    ("a negative length", headed(LENGTH, b"Content-Length: -1"), AT_ALL),
    ("a length of 10^30", headed(LENGTH, b"Content-Length: 1" + b"0" * 30), AT_ALL),
    # Chunks.
    ("chunks", in_chunks(chunks), "....."),
    ("chunks beside a length", headed_twice, "....."),
    ("a chunk with an extension", in_chunks(lambda body: chunks(body, b";a=" + b"b" * 999)), "....."),
    ("an extension for ever", for_ever(CHUNKED + b"5;a=", b"b" * 65536), AT_ALL),
    ("a chunk of 2^64", respond(CHUNKED + b"1" + b"0" * 16 + b"\r\n", close=True), AT_ALL),
    ("a chunk of no size", respond(CHUNKED + b"x\r\nabc", close=True), AT_ALL),
    ("chunks for ever", for_ever(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"), "RRRRR"),
    ("chunks without an end", in_chunks(lambda body: chunks(body)[:-5], close=True), "UUUU."),
    # Bodies.
    ("a login page", respond(response(200, b"<html>", {"Content-Type": "text/html"})), "RRRRR"),
    ("another bit", made(lambda head, body: head + b"\r\n\r\n" + body[:-2]
     + bytes(byte ^ 1 for byte in body[-2:-1]) + body[-1:]), "..RRR"),
    ("zeros", made(lambda head, body: head + b"\r\n\r\n" + bytes(len(body))), "R.RRR"),
    ("encoded", made(twice_packed), "RRRRR"),
    # Statuses.
    *[(str(status), answered(status), "UUUUU") for status in (408, 425, 429, 500, 502, 503, 504)],
    ("429 for an hour", answered(429, Retry_After="3600"), AT_ALL),
    ("404", answered(404), "UNNNN"),
    ("410", answered(410), "UNNNN"),
    ("403", answered(403), "PPPPP"),
    ("401", answered(401), "PPPPP"),
    ("401 for more each time", answered(401, WWW_Authenticate="Bearer realm=x"), "PRRRR"),
    ("418", answered(418), "URRRR"),
    ("206", headed(rb"HTTP/1.1 200", b"HTTP/1.1 206"), "U...R"),
    ("416", answered(416), "URRRR"),
    # Redirects.
    ("to another host", redirected("http://{other}{target}"), "U...."),
    ("to another host by 301", redirected("http://{other}{target}", 301), "U...."),
    ("to another host, with a fragment", redirected("http://{other}{target}#x"), "U...."),
    ("to another host that asks who we are", redirected("http://{other}/basic"), "UPPPP"),
    ("to itself", redirected("{target}"), "URRRR"),
    ("nowhere", answered(307), "URRRR"),
    ("to a link-local address", redirected("http://169.254.169.254{target}"), "URRRR"),
    ("to one behind IPv6", redirected("http://[::ffff:169.254.169.254]{target}"), "URRRR"),
    ("to a file", redirected("file:///etc/passwd"), "URRRR"),
    ("to a user", redirected("http://u:p@{other}{target}"), "URRRR"),
]  # fmt: skip

SECRET = "s3cr3t"


@pytest.fixture
def other() -> Iterator[FakeRegistry]:
    """A host that the registry leads to."""
    with FakeRegistry(realm="").running() as running:
        running.plan("/basic", answered(401, WWW_Authenticate='Basic realm="x"'), times=99)
        yield running


@pytest.fixture
def registry(other: FakeRegistry) -> Iterator[FakeRegistry]:
    with FakeRegistry(user="u", password=SECRET).running() as running:
        running.realm = f"http://{running.name}/token"
        yield running


@pytest.fixture
def served(registry: FakeRegistry, other: FakeRegistry) -> Served:
    made = Served(registry, (archive(member("noise", data=NOISE)),))
    other.content.update(registry.content)
    return made


def place(served: Served, stage: str) -> str:
    """Return what is asked for at a step."""
    return {
        "token": "GET /token",
        "tag": "/manifests/1$",
        "manifest": "GET .*/manifests/sha256:",
        "config": f"GET .*{served.config.digest}",
        "layer": f"GET .*{served.layers[0].digest}",
    }[stage]


def pull(stores: Stores, served: Served, what: str) -> None:
    """Do what a pull does, but for the unpacking."""
    patience = replace(HURRIED, attempts=3) if re.search("silent|1xx for ever", what) else QUICK
    access = Access(patience=patience, credentials=lambda _host: Credential("u", SECRET))
    lease = stores.leases.create().id

    async def run() -> None:
        async with open_client(access) as client:
            found = await client.resolve(served.reference)
            await client.document(served.reference, found.descriptor, limits.MANIFEST)
            await client.document(served.reference, served.config, limits.CONFIG)
            fetcher = Fetcher(client, stores.content, stores.root.trash, Lanes())
            layer = Sought(reference=served.reference, descriptor=served.layers[0], lease=lease)
            await fetcher.fetch(layer)

    trio.run(run)


def located(fault: Fault, other: FakeRegistry) -> Fault:
    """Put the other host's name where a row has a place for it."""

    class Naming:
        def __init__(self, connection: socket.socket) -> None:
            self._connection = connection

        def sendall(self, data: bytes) -> None:
            self._connection.sendall(data.replace(b"{other}", other.name.encode()))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

    def named(connection: Any, asked: Asked, good: bytes) -> bool:
        return fault(Naming(connection), asked, good)  # type: ignore[arg-type]

    return named


CASES = [
    pytest.param(what, fault, stage, kinds[number], id=f"{what}-{stage}")
    for what, fault, kinds in ROWS
    for number, stage in enumerate(STAGES)
]


@pytest.mark.parametrize(("what", "fault", "stage", "kind"), CASES)
def test_r11_behaviours_at_each_step(  # noqa: PLR0917  a row, and fixtures
    what: str,
    fault: Fault,
    stage: str,
    kind: str,
    stores: Stores,
    registry: FakeRegistry,
    other: FakeRegistry,
    served: Served,
) -> None:
    registry.plan(place(served, stage), located(fault, other), times=1000)
    if kind == ".":
        pull(stores, served, what)
    else:
        with pytest.raises(KINDS[kind]) as error:
            pull(stores, served, what)
        assert registry.name in str(error.value)
        assert "\n" not in str(error.value)
        assert SECRET not in str(error.value)
    bound = 2 * limits.ATTEMPTS * (limits.REDIRECTS + 1) if what.startswith("to ") else 20
    assert registry.count(place(served, stage)) <= bound
    secrets = {"authorization", "cookie"}
    assert not [asked for asked in other.asked if secrets & asked.headers.keys() or SECRET in str(asked)]
    # What is left is a beginning of the layer, which is not asked for again.
    left = sum(status.offset for status in stores.content.statuses())
    size = served.layers[0].size
    registry._planned.clear()
    registry.asked.clear()
    pull(stores, served, "")
    assert b"".join(stores.content.read_verified(served.layers[0].key))
    assert not stores.content.statuses()
    starts = [
        asked.headers.get("range", "bytes=0-")
        for asked in registry.asked
        if asked.path.endswith(served.layers[0].digest) and "authorization" in asked.headers
    ]
    assert starts == ([] if kind == "." else [f"bytes={left}-"])
    assert left < size


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("times", [1, 2])
def test_what_passes_at_each_step(
    stage: str, times: int, stores: Stores, registry: FakeRegistry, served: Served
) -> None:
    """A burst of what passes, the last of which is told when to come again."""
    for _ in range(times):
        registry.plan(place(served, stage), answered(503))
    registry.plan(place(served, stage), reset())
    registry.plan(place(served, stage), answered(429, Retry_After="0"))
    pull(stores, served, "")
    assert registry.count(place(served, stage)) <= 1 + times + 2 + 2


def test_a_token_that_ends_between_two_ranges_of_a_layer(
    stores: Stores, registry: FakeRegistry, served: Served
) -> None:
    def ends(connection: socket.socket, asked: Asked, good: bytes) -> bool:
        registry.token = "token-2"
        return cut(1000)(connection, asked, good)

    registry.plan(place(served, "layer"), ends)
    pull(stores, served, "")
    assert registry.count("GET /token") == 2


def test_keep_alive_connections_that_were_closed_meanwhile(
    stores: Stores, registry: FakeRegistry, served: Served
) -> None:
    registry.plan("", made(lambda head, body: head + b"\r\n\r\n" + body, close=True), times=99)
    pull(stores, served, "")
    assert len(registry.asked) == 7  # one to hear who is let in, and two for a token, among them


def test_nothing_is_expected_before_a_body(
    stores: Stores, registry: FakeRegistry, served: Served
) -> None:
    # So that a host that never says "100 Continue" is not waited for.
    pull(stores, served, "")
    assert not [asked for asked in registry.asked if "expect" in asked.headers]


def test_what_is_slow_and_last_is_waited_for(
    stores: Stores, registry: FakeRegistry, served: Served
) -> None:
    def slowly(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
        for byte in good:
            connection.sendall(bytes([byte]))
        return True

    registry.plan(place(served, "config"), slowly)
    pull(stores, served, "")
