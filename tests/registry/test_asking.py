"""One client against one registry: what comes of each way in which it can behave.

The table is that of behaviours by stage; each row says what comes of it, and bounds the requests.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from socket import socket
from typing import Any

import pytest
import trio

from engine import limits
from engine.errors import (
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Refused,
    Unavailable,
)
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.oci.reference import parse_reference
from engine.registry.client import Access, Client
from engine.registry.credentials import Credential
from engine.registry.hosts import Capability, Host, Origin, default_host
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, cut, reset, respond, response, stall
from tests.engine.image_files import INDEX, MANIFEST
from tests.registry.asking import HURRIED, QUICK, Served, read_blob, with_client

STAGES = {
    "tag": "(HEAD|GET) .*/manifests/1$",
    "manifest": "GET .*/manifests/sha256:",
    "config": "GET .*/blobs/sha256:",
}


@pytest.fixture
def served(registry: FakeRegistry) -> Served:
    return Served(registry)


async def pulled(client: Client, served: Served) -> tuple[bytes, bytes, bytes]:
    """Do what a pull does, and return all that came."""
    found = await client.resolve(served.reference)
    assert found.descriptor == served.manifest
    manifest = await client.document(served.reference, found.descriptor, limits.MANIFEST)
    config = await client.document(served.reference, served.config, limits.CONFIG)
    return manifest, config, await read_blob(client, served, served.layers[0])


def test_an_image_is_read(served: Served, registry: FakeRegistry) -> None:
    manifest, config, layer = with_client(lambda client: pulled(client, served))
    assert manifest == served.data
    assert [digest_of(config), digest_of(layer)] == [served.config.digest, served.layers[0].digest]
    assert len(registry.asked) == 4
    assert all(asked.headers["accept-encoding"] == "identity" for asked in registry.asked)
    assert "authorization" not in registry.asked[0].headers


def answered(status: int, headers: dict[str, str] | None = None) -> Fault:
    return respond(response(status, b"no", headers))


def hurried(what: str) -> Access:
    """Return the access for a row: only of hosts that say nothing it matters how long that takes."""
    return Access(patience=HURRIED if "silent" in what else QUICK)


AGAIN: Sequence[tuple[str, Fault]] = [
    ("reset before a byte", reset()),
    ("closed before a byte", cut()),
    ("silent", stall()),
    ("half a header", respond(b"HTTP/1.1 200 OK\r\nContent-", close=True)),
    ("no HTTP at all", respond(b"SSH-2.0-x\r\n", close=True)),
    *[(str(status), answered(status)) for status in (408, 429, 500, 502, 503, 504)],
    ("429 for a second ago", answered(429, {"Retry-After": "Wed, 31 Dec 2025 00:00:10 GMT"})),
    ("429 for now", answered(429, {"Retry-After": "0"})),
    ("429 for nonsense", answered(429, {"Retry-After": "-5"})),
]
NEVER: Sequence[tuple[str, Fault, type[EngineError], int]] = [
    ("always reset", reset(), Unavailable, 5),
    ("always silent", stall(), Unavailable, 5),
    ("always 503", answered(503), Unavailable, 5),
    ("429 for an hour", answered(429, {"Retry-After": "3600"}), Unavailable, 1),
    ("429 for ever", answered(429, {"Retry-After": "9" * 300}), Unavailable, 1),
    ("404", answered(404), NotFound, 2),
    ("403", answered(403), PermissionDenied, 2),
    ("401 without a challenge", answered(401), PermissionDenied, 2),
    ("401 for Digest", answered(401, {"WWW-Authenticate": 'Digest realm="x"'}), PermissionDenied, 2),
    ("418", answered(418), Refused, 2),
    ("redirects to itself", lambda c, a, g: answered(307, {"Location": a.target})(c, a, g), Refused, 6),
    ("redirects to metadata", answered(307, {"Location": "http://169.254.169.254/x"}), Refused, 1),
    ("redirects to a file", answered(307, {"Location": "file:///etc/shadow"}), Refused, 1),
    ("redirects to a user", answered(307, {"Location": "http://u:p@127.0.0.1/"}), Refused, 1),
    ("10^5 header lines", respond(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000), Unavailable, 5),
    ("1 MB in a header", respond(b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000), Unavailable, 5),
    ("two lengths", respond(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
     Unavailable, 5),
]  # fmt: skip


@pytest.mark.parametrize("stage", ["manifest", "config"])
@pytest.mark.parametrize("fault", [cut(-3), reset(-3), cut(0)], ids=["cut", "reset", "no byte"])
def test_a_document_that_breaks_off_is_asked_for_again(
    stage: str, fault: Fault, served: Served, registry: FakeRegistry
) -> None:
    registry.plan(STAGES[stage], fault, times=2)
    with_client(lambda client: pulled(client, served))
    assert len(registry.asked) == 6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("what", "fault"), AGAIN, ids=[row[0] for row in AGAIN])
def test_what_passes_is_asked_again(
    stage: str, what: str, fault: Fault, served: Served, registry: FakeRegistry
) -> None:
    registry.plan(STAGES[stage], fault, times=2)
    with_client(lambda client: pulled(client, served), hurried(what))
    assert len(registry.asked) == 6 or what == "silent"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("what", "fault", "kind", "most"), NEVER, ids=[row[0] for row in NEVER])
def test_what_does_not_pass_is_an_error(
    stage: str,
    what: str,
    fault: Fault,
    kind: type[EngineError],
    most: int,
    served: Served,
    registry: FakeRegistry,
) -> None:
    registry.plan(STAGES[stage], fault, times=100)
    with pytest.raises(kind) as error:
        with_client(lambda client: pulled(client, served), hurried(what))
    message = str(error.value)
    assert registry.name in message
    assert "\n" not in message
    assert registry.count(STAGES[stage]) <= most * (2 if stage == "tag" else 1)


BODIES: Sequence[tuple[str, Fault, type[EngineError]]] = [
    ("cut in the middle", cut(-3), Unavailable),
    ("reset in the middle", reset(-3), Unavailable),
    ("silent in the middle", stall(-3), Unavailable),
    ("chunks cut", respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", close=True),
     Unavailable),
    ("a chunk of 2^64", respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
     b"10000000000000000\r\n", close=True), Unavailable),
    ("too short", respond(response(200, b"short")), Refused),
    ("too long", respond(response(200, b"x" * 10_000)), Refused),
    ("too long, in chunks", respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
     + b"2710\r\n" + b"x" * 10_000 + b"\r\n0\r\n\r\n"), Refused),
    ("a login page", respond(response(200, b"<html>", {"Content-Type": "text/html"})), Refused),
]  # fmt: skip


@pytest.mark.parametrize("stage", ["manifest", "config"])
@pytest.mark.parametrize(("what", "fault", "kind"), BODIES, ids=[row[0] for row in BODIES])
def test_m04_documents_that_do_not_come_whole(
    stage: str, what: str, fault: Fault, kind: type[EngineError], served: Served, registry: FakeRegistry
) -> None:
    registry.plan(STAGES[stage], fault, times=100)
    with pytest.raises(kind):
        with_client(lambda client: pulled(client, served), hurried(what))


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("stage", ["manifest", "config"])
def test_m05_a_document_of_another_digest(stage: str, served: Served, registry: FakeRegistry) -> None:
    data = (
        served.data if stage == "manifest" else registry.content[f"/a/blobs/{served.config.digest}"][1]
    )
    registry.plan(STAGES[stage], respond(response(200, flipped(data))), times=9)
    with pytest.raises(DigestMismatch, match=registry.name):
        with_client(lambda client: pulled(client, served))
    assert registry.count(STAGES[stage]) == 1


# -- what a tag means -----------------------------------------------------------------------------


def resolved(served: Served, name: str = "") -> Descriptor:
    reference = parse_reference(name) if name else served.reference
    found = with_client(lambda client: client.resolve(reference))
    assert found.data in {None, served.data}
    return found.descriptor


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
def test_a_host_that_knows_no_head(status: int, served: Served, registry: FakeRegistry) -> None:
    registry.plan("HEAD", response_without_body(status))
    assert resolved(served) == served.manifest


def response_without_body(status: int, headers: dict[str, str] | None = None) -> Fault:
    return respond(response(status, headers={"Content-Length": "0", **(headers or {})}))


@pytest.mark.parametrize(
    "headers",
    [{}, {"Docker-Content-Digest": "md5:0"}, {"Docker-Content-Digest": "sha256:x"},
     {"Docker-Content-Digest": "sha256:" + "0" * 64, "Content-Type": "text/html"}],
    ids=["none", "another algorithm", "malformed", "no type"],
)  # fmt: skip
def test_a_header_that_does_not_suffice(
    headers: dict[str, str], served: Served, registry: FakeRegistry
) -> None:
    registry.plan("HEAD", respond(response(200, headers={**headers, "Content-Length": "10"})))
    assert resolved(served) == served.manifest


@pytest.mark.parametrize("kind", ["", "application/json", "text/plain", f"{MANIFEST}; charset=utf-8"])
def test_media_types_as_hosts_send_them(kind: str, served: Served, registry: FakeRegistry) -> None:
    registry.content["/a/manifests/1"] = (kind, served.data)
    assert resolved(served) == served.manifest


def test_m05_the_digest_in_a_header_is_held_against_the_bytes(
    served: Served, registry: FakeRegistry
) -> None:
    registry.plan("HEAD", response_without_body(405))
    lie = {"Docker-Content-Digest": digest_of(b"other"), "Content-Type": MANIFEST}
    registry.plan("GET", respond(response(200, served.data, lie)))
    with pytest.raises(DigestMismatch):
        resolved(served)


def test_by_digest(served: Served, registry: FakeRegistry) -> None:
    name = f"{registry.name}/a@{served.manifest.digest}"
    assert resolved(served, name) == served.manifest
    other = {
        "Docker-Content-Digest": digest_of(b"other"),
        "Content-Type": MANIFEST,
        "Content-Length": "9",
    }
    registry.plan("HEAD", respond(response(200, headers=other)))
    assert resolved(served, name) == served.manifest
    with pytest.raises(NotFound, match="NOT_FOUND: as a registry says it"):
        resolved(served, f"{registry.name}/a@{digest_of(b'none')}")


def test_a_tag_that_moves_meanwhile(served: Served, registry: FakeRegistry) -> None:
    async def work(client: Client) -> bytes:
        found = await client.resolve(served.reference)
        registry.put("a", "manifests", b"{}", MANIFEST, "1")
        return await client.document(served.reference, found.descriptor, limits.MANIFEST)

    assert with_client(work) == served.data


@pytest.mark.parametrize("by_get", [False, True])
def test_m03_a_manifest_beyond_bounds(by_get: bool, served: Served, registry: FakeRegistry) -> None:
    if by_get:
        registry.plan("HEAD", response_without_body(405))
    registry.content["/a/manifests/1"] = (MANIFEST, b" " * (limits.MANIFEST + 1))
    with pytest.raises(Refused, match="over"):
        resolved(served)
    huge = Descriptor(media_type=MANIFEST, digest=digest_of(b""), size=1 << 62)
    with pytest.raises(Refused, match="too many for its kind"):
        with_client(lambda client: client.document(served.reference, huge, limits.MANIFEST))


def test_schema_1(served: Served, registry: FakeRegistry) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    registry.content["/a/manifests/1"] = (kind, b"{}")
    with pytest.raises(Refused, match="schema 1"):
        resolved(served)


# -- blobs ----------------------------------------------------------------------------------------


def blob(served: Served, offset: int = 0) -> bytes:
    found = with_client(lambda client: read_blob(client, served, served.layers[0], offset))
    assert isinstance(found, bytes)
    return found


def whole(served: Served) -> bytes:
    return served.registry.content[f"/a/blobs/{served.layers[0].digest}"][1]


def test_a_blob_from_a_byte_on(served: Served, registry: FakeRegistry) -> None:
    assert blob(served, 10) == whole(served)[10:]
    assert registry.asked[-1].headers["range"] == "bytes=10-"


def test_a_host_that_knows_no_ranges(served: Served, registry: FakeRegistry) -> None:
    registry.plan("blobs", respond(response(200, whole(served))))
    assert blob(served, 10) == whole(served)[10:]


def test_a_host_that_does_not_take_the_range(served: Served, registry: FakeRegistry) -> None:
    registry.plan("blobs", respond(response(416)))
    assert blob(served, 10) == whole(served)[10:]


def test_a_host_that_sends_a_part(served: Served, registry: FakeRegistry) -> None:
    data = whole(served)
    headers = {"Content-Range": f"bytes 10-19/{len(data)}"}
    registry.plan("blobs", respond(response(206, data[10:20], headers)))
    assert blob(served, 10) == data[10:20]


def test_m04_a_part_that_was_not_asked_for(served: Served, registry: FakeRegistry) -> None:
    data = whole(served)
    size = len(data)
    for said in (f"bytes 11-{size - 1}/{size}", f"bytes 10-{size - 1}/{size + 1}", "", "bytes x",
                 f"bytes 10-{size}/{size}"):  # fmt: skip
        registry.plan("blobs", respond(response(206, data[10:], {"Content-Range": said})))
        with pytest.raises(Refused):
            blob(served, 10)


def test_a_body_without_a_length(served: Served, registry: FakeRegistry) -> None:
    data = whole(served)
    registry.plan("blobs", respond(response(200, data, {"Connection": "close"}), close=True))
    assert blob(served) == data
    registry.plan("blobs", respond(response(200, data[:-1], {"Connection": "close"}), close=True))
    with pytest.raises(Unavailable, match="broke off 1 bytes before the end"):
        blob(served)
    # All is there, and the host never says so.
    registry.plan("blobs", stall_after(response(200, data, {"Connection": "close"})))
    found = with_client(
        lambda client: read_blob(client, served, served.layers[0]), Access(patience=HURRIED)
    )
    assert found == data
    registry.plan("blobs", respond(response(200, data + b"x", {"Connection": "close"}), close=True))
    with pytest.raises(Refused, match="more bytes than"):
        blob(served)


def stall_after(answer: bytes) -> Fault:
    def fault(connection: Any, asked: Any, good: bytes) -> bool:
        return stall(1 << 30)(connection, asked, answer)

    return fault


def test_r12_a_body_that_drips(served: Served, registry: FakeRegistry) -> None:
    def fault(connection: Any, _asked: Any, _good: bytes) -> bool:
        connection.sendall(response(200, headers={"Content-Length": str(1 << 40)}))
        while True:  # until the client has enough of it
            connection.sendall(b"\0")

    registry.plan("blobs", fault)
    slow = replace(HURRIED, progress_bytes=1 << 60)
    huge = replace_size(served.layers[0], 1 << 40)
    with pytest.raises(Unavailable, match="sends less than"):
        with_client(lambda client: read_blob(client, served, huge), Access(patience=slow))


def replace_size(descriptor: Descriptor, size: int) -> Descriptor:
    return Descriptor(media_type=descriptor.media_type, digest=descriptor.digest, size=size)


def test_a_connection_is_used_again_and_given_up_when_cut(
    served: Served, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"\0" * (8 << 20)
    digest = registry.put("a", "blobs", large, "")
    connections = []
    serve = registry._serve
    monkeypatch.setattr(registry, "_serve", lambda plain: (connections.append(plain), serve(plain)))

    async def work(client: Client) -> None:
        for _ in range(3):
            await client.resolve(served.reference)
        async with client.blob(served.reference, served.layers[0]):
            pass  # left with its body unread, which is little
        await client.resolve(served.reference)
        assert len(connections) == 1
        descriptor = Descriptor(media_type="", digest=digest, size=len(large))
        async with client.blob(served.reference, descriptor):
            pass  # which is much
        await client.resolve(served.reference)

    with_client(work)
    assert len(connections) == 2


def test_cancelling_while_a_body_comes(served: Served, registry: FakeRegistry) -> None:
    registry.plan("blobs", stall(-3))

    async def work(client: Client) -> str:
        with trio.move_on_after(0.05):
            await read_blob(client, served, served.layers[0])
            return "read"
        return "cancelled"

    assert with_client(work) == "cancelled"


# -- who we are -----------------------------------------------------------------------------------

SECRET = "s3cr3t"


def known(host: str) -> Credential | None:
    return Credential("u", SECRET)


def access(**changes: Any) -> Access:
    return replace(Access(patience=QUICK), **changes)


def guarded(registry: FakeRegistry, realm: str, user: str = "") -> None:
    registry.realm, registry.user, registry.password = realm, user, SECRET


def test_basic(served: Served, registry: FakeRegistry) -> None:
    guarded(registry, "basic", "u")
    with_client(lambda client: pulled(client, served), access(credentials=known))
    assert len(registry.asked) == 5  # one to hear what is wanted
    with pytest.raises(PermissionDenied, match="log in"):
        with_client(lambda client: pulled(client, served))
    registry.password = "other"
    registry.asked.clear()
    with pytest.raises(PermissionDenied, match="log in"):
        with_client(lambda client: pulled(client, served), access(credentials=known))
    assert len(registry.asked) == 2


def test_tokens_for_anybody(served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")
    with_client(lambda client: pulled(client, served))
    assert registry.count("/token") == 1
    (asked,) = [one for one in registry.asked if one.path == "/token"]
    assert asked.target.endswith("?service=fake&scope=repository%3Aa%3Apull")
    assert "authorization" not in asked.headers


def test_tokens_by_password(served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token", "u")
    with_client(lambda client: pulled(client, served), access(credentials=known))
    # By OAuth2 first, as containerd does.
    assert registry.count("POST /token") == registry.count("GET /token") == 1


@pytest.mark.parametrize("identity", [False, True])
def test_tokens_by_oauth(identity: bool, served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token", "u")
    answer = json.dumps({"access_token": "token-1", "token": "other", "expires_in": 1}).encode()
    registry.plan("POST /token", respond(response(200, answer)))
    credential = Credential("", SECRET, identity) if identity else known("")
    with_client(lambda client: pulled(client, served), access(credentials=lambda _host: credential))
    (asked,) = [one for one in registry.asked if one.path == "/token"]
    expected = "grant_type=refresh_token" if identity else "grant_type=password"
    assert expected in asked.body.decode()
    assert "scope=repository%3Aa%3Apull" in asked.body.decode()


def test_one_token_serves_all_who_wait_for_it(served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")

    async def work(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.resolve, served.reference)

    with_client(work)
    assert registry.count("/token") == 1


def test_r07_a_token_that_ends_is_renewed_once(served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")

    async def work(client: Client) -> None:
        await client.resolve(served.reference)
        registry.token = "token-2"
        await client.resolve(served.reference)
        assert registry.count("/token") == 2
        registry.token = "token-3"
        stale = json.dumps({"token": "stale"}).encode()
        registry.plan("/token", respond(response(200, stale)), times=100)
        with pytest.raises(PermissionDenied):
            await client.resolve(served.reference)
        assert registry.count("/token") == 3

    with_client(work)


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a\\r\\nX: y"}', b'{"token": "a", "token": "b"}',
     b" " * (limits.TOKEN + 1)],
    ids=["nothing", "a list", "no token", "a number", "two lines", "twice", "over a MiB"],
)  # fmt: skip
def test_r07_answers_without_a_token(answer: bytes, served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")
    registry.plan("/token", respond(response(200, answer)), times=100)
    with pytest.raises(Refused):
        with_client(lambda client: client.resolve(served.reference))
    assert registry.count("/token") == 1


@pytest.mark.parametrize("life", [-1, 0, 1, 1e300, "soon", None])
def test_r07_lives_of_tokens(life: object, served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")
    answer = json.dumps({"token": "token-1", "expires_in": life}).encode()
    registry.plan("/token", respond(response(200, answer)), times=100)
    with_client(lambda client: pulled(client, served))
    assert registry.count("/token") == 1


TOKENS: Sequence[tuple[str, Fault, type[EngineError]]] = [
    ("reset", reset(), Unavailable),
    ("silent", stall(), Unavailable),
    ("503", answered(503), Unavailable),
    ("404", answered(404), Unavailable),
    ("401", answered(401), PermissionDenied),
    ("403", answered(403), PermissionDenied),
    ("307", answered(307, {"Location": "/elsewhere"}), Unavailable),
    ("cut", cut(3), Unavailable),
]


@pytest.mark.parametrize(("what", "fault", "kind"), TOKENS, ids=[row[0] for row in TOKENS])
def test_token_servers_that_fail(
    what: str, fault: Fault, kind: type[EngineError], served: Served, registry: FakeRegistry
) -> None:
    guarded(registry, f"http://{registry.name}/token", "u")
    registry.plan("/token", fault, times=100)
    with pytest.raises(kind) as error:
        with_client(
            lambda client: client.resolve(served.reference), replace(hurried(what), credentials=known)
        )
    assert registry.name in str(error.value)
    assert registry.count("/token") <= 10
    assert registry.count("/elsewhere") == 0


@pytest.mark.parametrize("what", ["reset", "503"])
def test_token_servers_that_fail_once(what: str, served: Served, registry: FakeRegistry) -> None:
    guarded(registry, f"http://{registry.name}/token")
    registry.plan("/token", reset() if what == "reset" else answered(503))
    with_client(lambda client: pulled(client, served))


REALMS = [
    "http://169.254.169.254/latest", "http://10.0.0.1/token", "http://0.0.0.0/token", "http://[fe80::1]/t",
    "http://[fd00::1]/t", "file:///etc/passwd", "gopher://x/", "http://u:p@127.0.0.1/token", "",
    "//x/token",
]  # fmt: skip


@pytest.mark.parametrize("realm", REALMS)
def test_r03_token_servers_that_are_not_asked(
    realm: str, served: Served, registry: FakeRegistry
) -> None:
    guarded(registry, realm or "\\", "u")
    with pytest.raises(Refused, match=registry.name):
        with_client(lambda client: client.resolve(served.reference), access(credentials=known))


# -- other hosts ----------------------------------------------------------------------------------


def secrets_seen(registry: FakeRegistry) -> list[str]:
    return [
        asked.target
        for asked in registry.asked
        if {"authorization", "x-secret", "cookie"} & asked.headers.keys()
    ]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_r01_a_redirect_to_another_host_takes_no_credentials_along(
    status: int, served: Served, registry: FakeRegistry
) -> None:
    with FakeRegistry().running() as other:
        other.content.update({f"/cdn{path}": found for path, found in registry.content.items()})
        guarded(registry, "basic", "u")
        digest = served.layers[0].digest
        location = {"Location": f"http://{other.name}/v2/cdn/a/blobs/{digest}?signed=s3cr3t"}
        registry.plan("GET .*/blobs/", answered(status, location), times=9)
        hosts = [replace(default_host(registry.name), headers=(("X-Secret", SECRET),))]
        found = with_client(
            lambda client: read_blob(client, served, served.layers[0], 5),
            access(credentials=known, hosts=lambda _domain: hosts),
        )
        assert found == whole(served)[5:]
        assert secrets_seen(registry)
        assert not secrets_seen(other)
        assert other.asked[-1].headers["range"] == "bytes=5-"


def test_r01_nobody_but_the_registry_is_told_who_we_are(served: Served, registry: FakeRegistry) -> None:
    with FakeRegistry().running() as other:
        guarded(other, "basic", "u")
        registry.plan("blobs", answered(307, {"Location": f"http://{other.name}/v2/x"}), times=9)
        with pytest.raises(PermissionDenied) as error:
            with_client(
                lambda client: read_blob(client, served, served.layers[0]), access(credentials=known)
            )
        assert other.name in str(error.value)
        assert not secrets_seen(other)
        # Nor once the way leads back.
        registry.asked.clear()
        other.plan("/v2/x", answered(307, {"Location": f"http://{registry.name}/v2/back"}))
        with pytest.raises(NotFound):
            with_client(
                lambda client: read_blob(client, served, served.layers[0]), access(credentials=known)
            )
        assert not secrets_seen(registry)


def test_r15_no_secret_in_a_message_or_a_log(
    served: Served, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    guarded(registry, f"http://{registry.name}/token", "u")
    location = {"Location": f"http://{registry.name}/v2/b?signature={SECRET}"}
    registry.plan("blobs", answered(307, location), times=9)
    registry.plan("/v2/b", answered(403), times=9)
    with pytest.raises(PermissionDenied) as error:
        with_client(
            lambda client: read_blob(client, served, served.layers[0]), access(credentials=known)
        )
    assert SECRET not in str(error.value)
    assert SECRET not in caplog.text
    assert "token-1" not in caplog.text


@pytest.mark.parametrize(
    ("realm", "stage"), [("basic", "manifests"), ("token", "manifests"), ("token", "/token")]
)
def test_r15_a_host_that_says_what_it_was_told(
    realm: str, stage: str, served: Served, registry: FakeRegistry
) -> None:
    guarded(registry, realm if realm == "basic" else f"http://{registry.name}/token", "u")

    def echo(connection: socket, asked: Asked, good: bytes) -> bool:
        sent = asked.headers.get("authorization")
        said = json.dumps({"errors": [{"message": f"{sent} {asked.body!r}"}]}).encode()
        connection.sendall(response(403, b"" if asked.method == "HEAD" else said) if sent else good)
        return True

    registry.plan(stage, echo, times=9)
    with pytest.raises(PermissionDenied) as error:
        with_client(lambda client: client.resolve(served.reference), access(credentials=known))
    told = str(error.value)
    assert not [one for one in (SECRET, "token-1", registry._basic()[6:]) if one in told]


@pytest.mark.parametrize("where", ["b.example/" + "a" * 70_000, "xn--/x", "b..example/", "0x7f.1:1/x"])
def test_r01_a_redirect_to_what_is_no_place(where: str, served: Served, registry: FakeRegistry) -> None:
    registry.plan("blobs", answered(307, {"Location": f"http://{where}"}), times=9)
    with pytest.raises((Refused, Unavailable)):
        with_client(lambda client: read_blob(client, served, served.layers[0]))


def mirrored(mirror: FakeRegistry, registry: FakeRegistry, *capabilities: Capability) -> Access:
    first = default_host(mirror.name)
    own = default_host(registry.name)
    can = frozenset(capabilities or Capability)
    return access(hosts=lambda _domain: [replace(first, namespace=registry.name, capabilities=can), own])


@pytest.fixture
def mirror(registry: FakeRegistry, served: Served) -> Iterator[FakeRegistry]:
    with FakeRegistry(content=registry.content).running() as running:
        yield running


def test_a_mirror_is_asked_first(served: Served, registry: FakeRegistry, mirror: FakeRegistry) -> None:
    with_client(lambda client: pulled(client, served), mirrored(mirror, registry))
    assert (len(mirror.asked), len(registry.asked)) == (4, 0)
    namespace = registry.name.replace(":", "%3A")
    assert all(asked.target.endswith(f"?ns={namespace}") for asked in mirror.asked)


MIRRORS: Sequence[tuple[str, Fault]] = [
    ("404", answered(404)),
    ("403", answered(403)),
    ("500", answered(500)),
    ("418", answered(418)),
    ("reset", reset()),
    ("silent", stall()),
    ("a login page", respond(response(200, b"<html>", {"Content-Type": "text/html"}))),
    ("401", answered(401, {"WWW-Authenticate": 'Basic realm="x"'})),
]


@pytest.mark.parametrize(("what", "fault"), MIRRORS, ids=[row[0] for row in MIRRORS])
def test_r09_where_a_mirror_fails_the_registry_is_asked(
    what: str, fault: Fault, served: Served, registry: FakeRegistry, mirror: FakeRegistry
) -> None:
    mirror.plan("", fault, times=100)
    found = mirrored(mirror, registry)
    if what == "silent":
        found = replace(found, patience=HURRIED)
    with_client(lambda client: pulled(client, served), found)
    assert len(registry.asked) == 4 or what == "silent"
    assert len(mirror.asked) <= 4 * 2


def test_r09_a_mirror_that_lies(served: Served, registry: FakeRegistry, mirror: FakeRegistry) -> None:
    mirror.plan("GET .*/manifests/", respond(response(200, flipped(served.data))), times=9)
    with_client(lambda client: pulled(client, served), mirrored(mirror, registry))
    assert registry.count("manifests") == 1


def test_r09_a_mirror_may_be_for_content_alone(
    served: Served, registry: FakeRegistry, mirror: FakeRegistry
) -> None:
    mirror.put("a", "manifests", b"stale", MANIFEST, "1")
    registry.put("a", "manifests", served.data, MANIFEST, "1")
    with_client(lambda client: pulled(client, served), mirrored(mirror, registry, Capability.PULL))
    assert registry.count("/manifests/1") == 1
    assert len(registry.asked) == 1


def test_hosts_that_may_not_be_asked(served: Served, registry: FakeRegistry) -> None:
    host = Host(origin=default_host(registry.name).origin, capabilities=frozenset({Capability.PUSH}))
    with pytest.raises(FailedPrecondition, match="resolve"):
        with_client(
            lambda client: client.resolve(served.reference), access(hosts=lambda _domain: [host])
        )


def test_a_host_that_is_not_there() -> None:
    with FakeRegistry().running() as gone:
        name = gone.name
    with pytest.raises(Unavailable, match=f"{name} cannot be reached"):
        with_client(lambda client: client.resolve(parse_reference(f"{name}/a:1")))


def test_r14_the_environment_names_no_proxy(
    served: Served, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with_client(lambda client: pulled(client, served))


@pytest.mark.parametrize("proxy", ["x", "ftp://u:s3cr3t@x", "http://[::1", "socks5://x", "http://:1"])
def test_a_proxy_that_is_none(proxy: str) -> None:
    with pytest.raises(InvalidArgument, match="the proxy is no http") as error:
        with_client(lambda client: client.destination("a.example"), access(proxy=proxy))
    assert SECRET not in str(error.value)


def test_a_proxy_that_is_configured(served: Served, registry: FakeRegistry) -> None:
    with FakeRegistry().running() as proxy:
        proxy.plan("", answered(407), times=9)
        with pytest.raises(Refused, match="407"):
            with_client(
                lambda client: client.resolve(served.reference), access(proxy=f"http://{proxy.name}")
            )
        secure = [replace(default_host("r.example"), origin=Origin("https", "r.example", 443))]
        with pytest.raises(Unavailable, match="proxy"):
            with_client(
                lambda client: client.resolve(parse_reference("r.example/a:1")),
                access(proxy=f"http://{proxy.name}", hosts=lambda _domain: secure),
            )
        assert not registry.asked


# -- what refers to an image ----------------------------------------------------------------------


def listed(*entries: Descriptor, **changes: Any) -> bytes:
    shapes = [
        {
            "mediaType": MANIFEST,
            "digest": one.digest,
            "size": one.size,
            "artifactType": one.artifact_type,
        }
        for one in entries
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": shapes, **changes}).encode()


def entry(number: int, kind: str = "a/b") -> Descriptor:
    digest = digest_of(str(number).encode())
    return Descriptor(media_type=MANIFEST, digest=digest, size=number, artifact_type=kind)


def referrers(served: Served, kind: str = "") -> list[Descriptor]:
    digest = served.manifest.key
    found = with_client(lambda client: client.referrers(served.reference, digest, kind))
    assert isinstance(found, list)
    return found


def test_referrers(served: Served, registry: FakeRegistry) -> None:
    digest = served.manifest.digest
    assert referrers(served) == []
    registry.content[f"/a/manifests/{digest.replace(':', '-')}"] = (INDEX, listed(entry(1)))
    assert referrers(served) == [entry(1)]
    path = f"/a/referrers/{digest}"
    registry.content[path] = (INDEX, listed(entry(2), entry(3, "c/d")))
    assert referrers(served) == [entry(2), entry(3, "c/d")]
    assert referrers(served, "c/d") == [entry(3, "c/d")]


def test_pages_of_referrers(served: Served, registry: FakeRegistry) -> None:
    path = f"/v2/a/referrers/{served.manifest.digest}"
    link = {"Link": f'<{path}?page=2>; rel="next"'}
    registry.plan("referrers.*page=2", respond(response(200, listed(entry(2)))))
    registry.plan("referrers", respond(response(200, listed(entry(1)), link)))
    assert referrers(served) == [entry(1), entry(2)]


def test_m08_pages_that_do_not_end(served: Served, registry: FakeRegistry) -> None:
    path = f"/v2/a/referrers/{served.manifest.digest}"
    for target, times in ((f"{path}?page=2", 2), ("http://127.0.0.1:1/x", 1)):
        link = {"Link": f'<{target}>; rel="next"'}
        registry.plan("referrers", respond(response(200, listed(entry(1)), link)), times)
        with pytest.raises(Refused):
            referrers(served)
    many = listed(*[entry(1)] * (limits.REFERRERS + 1))
    registry.plan("referrers", respond(response(200, many)))
    with pytest.raises(Refused, match="over 1000"):
        referrers(served)
