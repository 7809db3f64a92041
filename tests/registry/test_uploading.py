"""Uploads: every way in which one can go wrong, and what comes of it."""

import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs

import pytest

from engine import limits
from engine.errors import EngineError, PermissionDenied, Refused, Unavailable
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.oci.reference import parse_reference
from engine.registry.client import Access, Client
from engine.registry.credentials import Credential
from engine.registry.hosts import Origin
from engine.registry.lanes import ImageLanes, Lanes
from engine.registry.protocol import BadAnswer, received, upload_place
from engine.registry.uploading import Outgoing, Uploader, Way
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, reset, respond, response, stall
from engine.testing.taking_registry import TakingRegistry
from tests.registry.asking import HURRIED, QUICK, with_client

DATA = random.Random("blob").randbytes(300_000)
BLOB = Descriptor(media_type="x/y", digest=digest_of(DATA), size=len(DATA))


@pytest.fixture
def registry() -> Iterator[TakingRegistry]:
    with TakingRegistry().running() as running:
        yield running


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PUSH_WHOLE", 1000)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = BytesIO(data)

    async def read(self) -> bytes:
        return self._data.read(70_000)


def reading(data: bytes) -> Callable[[int], Any]:
    @asynccontextmanager
    async def read(offset: int) -> AsyncIterator[_Bytes]:
        yield _Bytes(data[offset:])

    return read


def upload(
    registry: FakeRegistry,
    data: bytes = DATA,
    elsewhere: str = "",
    access: Access | None = None,
    lanes: ImageLanes | None = None,
) -> Way:
    """Push one blob to the repository `a`."""
    reference = parse_reference(f"{registry.name}/a:1")
    blob = Descriptor(media_type="x/y", digest=digest_of(data), size=len(data))

    async def work(client: Client) -> Way:
        host = await client.destination(reference.domain)
        uploader = Uploader(client, host, reference, lanes or Lanes().of_image())
        return await uploader.blob(Outgoing(descriptor=blob, read=reading(data), elsewhere=elsewhere))

    way = with_client(work, access)
    assert isinstance(way, Way)
    return way


def methods(registry: FakeRegistry) -> str:
    return " ".join(asked.method for asked in registry.asked)


def answer(status: int, **headers: str) -> Fault:
    return respond(response(status, headers={k.replace("_", "-"): v for k, v in headers.items()}))


def test_r_02_a_host_that_takes_a_byte_at_once_is_not_sent_the_rest_for_each(
    registry: TakingRegistry,
) -> None:
    def drip(connection: socket.socket, asked: Asked, good: bytes) -> bool:
        taken = registry.count("PATCH")
        return answer(202, Range=f"0-{taken}")(connection, asked, good)

    registry.plan("PATCH", drip, times=1000)
    with pytest.raises(Unavailable, match="took 1 bytes at once"):
        upload(registry)
    assert registry.count("PATCH") == limits.ATTEMPTS


def test_a_blob_goes_once_in_one_part(registry: TakingRegistry) -> None:
    assert upload(registry) is Way.SENT
    assert registry.content[f"/a/blobs/{BLOB.digest}"][1] == DATA
    assert methods(registry) == "HEAD POST PATCH PUT"
    registry.asked.clear()
    assert upload(registry) is Way.THERE
    assert methods(registry) == "HEAD"


@pytest.mark.parametrize("size", [500, len(DATA)])
def test_all_that_goes_is_counted(registry: TakingRegistry, size: int) -> None:
    went: list[int] = []

    async def passed(count: int) -> None:
        went.append(count)

    lanes = Lanes().of_image()
    lanes.passed = passed  # type: ignore[method-assign]
    upload(registry, DATA[:size], lanes=lanes)
    assert sum(went) == size


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_small_blob_goes_with_the_end_of_its_upload(registry: TakingRegistry, size: int) -> None:
    assert upload(registry, DATA[:size]) is Way.SENT
    assert methods(registry) == "HEAD POST PUT"


@dataclass(frozen=True)
class Case:
    """A fault at a stage, and the requests that follow from it or the error that it is."""

    stage: str
    fault: Fault
    then: str = ""
    error: type[EngineError] | None = None
    kept: int | None = None
    small: bool = False


BUSY = "HEAD POST PATCH GET PATCH PUT"
ANEW = "HEAD POST PATCH HEAD POST PATCH PUT"
ELSEWHERE = "https://elsewhere.example/v2/a/blobs/uploads/1"
CASES = {
    # what is there already
    "looking: busy": Case("HEAD", answer(503), "HEAD HEAD POST PATCH PUT"),
    "looking: cut off": Case("HEAD", reset(), "HEAD HEAD POST PATCH PUT"),
    "looking: not allowed": Case("HEAD", answer(405), "HEAD POST PATCH PUT"),
    "looking: another size": Case("HEAD", answer(200, Content_Length="7"), "HEAD", Refused),
    "looking: forbidden": Case("HEAD", answer(403), "HEAD", PermissionDenied),
    # an upload begins
    "beginning: busy": Case("POST", answer(429), "HEAD POST HEAD POST PATCH PUT"),
    "beginning: cut off": Case("POST", reset(), "HEAD POST HEAD POST PATCH PUT"),
    "beginning: no place": Case("POST", answer(202), "HEAD POST", Refused),
    "beginning: no URL": Case("POST", answer(202, Location="http://["), "HEAD POST", Refused),
    "beginning: elsewhere": Case("POST", answer(202, Location=ELSEWHERE), "HEAD POST", Refused),
    "beginning: a page": Case("POST", answer(200), "HEAD POST", Refused),
    "beginning: redirected": Case("POST", answer(307, Location="/v2/"), "HEAD POST", Refused),
    "beginning: forbidden": Case("POST", answer(403), "HEAD POST", PermissionDenied),
    # a part is sent
    "sending: busy": Case("PATCH", answer(503), "HEAD POST PATCH GET HEAD POST PATCH PUT"),
    "sending: cut off in the middle": Case("PATCH", reset(), BUSY, kept=100_000),
    "sending: the answer is lost": Case("PATCH", reset(), "HEAD POST PATCH GET PUT", kept=1 << 20),
    "sending: asked who": Case("PATCH", answer(401), "HEAD POST PATCH", PermissionDenied),
    "sending: another part": Case("PATCH", answer(416), BUSY, kept=5000),
    "sending: unknown": Case("PATCH", answer(404), ANEW),
    "sending: no place": Case("PATCH", answer(202), "HEAD POST PATCH PUT", kept=1 << 20),
    "sending: less was taken": Case(
        "PATCH", answer(202, Range="0-4999"), "HEAD POST PATCH PATCH PUT", kept=5000
    ),
    "sending: more than was sent": Case("PATCH", answer(202, Range="0-300000"), BUSY, kept=5000),
    "sending: an odd range": Case("PATCH", answer(202, Range="5-9"), "HEAD POST PATCH", Refused),
    "sending: elsewhere": Case("PATCH", answer(202, Location=ELSEWHERE), "HEAD POST PATCH", Refused),
    "sending: redirected": Case("PATCH", answer(308, Location="/x"), "HEAD POST PATCH", Refused),
    "sending: too large, as a proxy says": Case(
        "PATCH", answer(413), "HEAD POST PATCH GET HEAD POST PATCH PATCH PATCH PUT"
    ),
    "sending: refused": Case("PATCH", answer(400), "HEAD POST PATCH", Refused),
    "sending: forbidden": Case("PATCH", answer(403), "HEAD POST PATCH", PermissionDenied),
    # an upload ends
    "ending: busy": Case("PUT", answer(500), "HEAD POST PATCH PUT GET PUT"),
    "ending: cut off": Case("PUT", reset(), "HEAD POST PATCH PUT GET PUT"),
    "ending: the answer is lost": Case("PUT", reset(), "HEAD POST PATCH PUT GET HEAD", kept=0),
    "ending: unknown": Case("PUT", answer(404), "HEAD POST PATCH PUT HEAD POST PATCH PUT"),
    "ending: another part": Case("PUT", answer(416), "HEAD POST PATCH PUT GET PUT"),
    "ending: the digest is wrong": Case("PUT", answer(400), "HEAD POST PATCH PUT", Refused),
    "ending: another digest": Case(
        "PUT", answer(201, Docker_Content_Digest=digest_of(b"x")), "HEAD POST PATCH PUT", Refused
    ),
    "ending: a page": Case("PUT", answer(200), "HEAD POST PATCH PUT", Refused),
    "ending: redirected": Case("PUT", answer(307, Location="/x"), "HEAD POST PATCH PUT", Refused),
    "all at once: busy": Case("PUT", answer(503), "HEAD POST PUT HEAD POST PUT", small=True),
    "all at once: cut off": Case("PUT", reset(), "HEAD POST PUT HEAD POST PUT", small=True),
    "all at once: unknown": Case("PUT", answer(404), "HEAD POST PUT HEAD POST PUT", small=True),
    "all at once: the answer is lost": Case(
        "PUT", reset(), "HEAD POST PUT HEAD", kept=1 << 20, small=True
    ),
    "all at once: the digest is wrong": Case("PUT", answer(400), "HEAD POST PUT", Refused, small=True),
}


@pytest.mark.parametrize("what", CASES)
def test_what_a_host_does_and_what_comes_of_it(
    what: str, registry: TakingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[what]
    monkeypatch.setattr(limits, "PUSH_PART", 120_000)
    data = DATA[:500] if case.small else DATA
    registry.kept = case.kept
    registry.plan(f"^{case.stage} ", case.fault)
    with pytest.raises(case.error) if case.error else nullcontext():
        upload(registry, data)
    there = registry.content.get(f"/a/blobs/{digest_of(data)}", ("", None))[1]
    assert there == (None if case.error else data)
    assert methods(registry) == case.then


def test_what_goes_on_is_not_given_up(registry: TakingRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROGRESS_BYTES", 40_000)
    registry.kept = 40_000
    registry.plan("^PATCH ", reset(), times=7)
    assert upload(registry) is Way.SENT
    begun = [one.headers.get("content-range") for one in registry.asked if one.method == "PATCH"]
    assert begun == [None, *(f"{n * 40_000}-{len(DATA) - 1}" for n in range(1, 8))]
    assert registry.count("^POST ") == 1


PASSING_FAULTS = [
    reset(),
    answer(429),
    answer(500),
    answer(404),
    answer(416),
    answer(202, Range="0-49999"),
    answer(202, Range="0-999999"),
]
OF_STATE = [answer(204), answer(204, Range="0-0"), answer(204, Range="0-99999")]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_a_blob_is_right_or_not_there(registry: TakingRegistry, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(chance.randrange(1, 9)):
        stage = chance.choice(["HEAD", "POST", "PATCH", "PATCH", "PATCH", "GET", "PUT"])
        registry.plan(f"^{stage} ", chance.choice(OF_STATE if stage == "GET" else PASSING_FAULTS))
    registry.kept = chance.choice([None, 0, 1, 50_000, 100_000, len(DATA)])
    try:
        upload(registry)
    except EngineError:
        assert registry.content.get(f"/a/blobs/{BLOB.digest}", ("", DATA))[1] == DATA
    else:
        assert registry.content[f"/a/blobs/{BLOB.digest}"][1] == DATA
    assert len(registry.asked) < 60


@pytest.mark.parametrize("stage", ["HEAD", "POST", "PATCH", "PUT"])
def test_what_does_not_go_on_is_given_up(registry: TakingRegistry, stage: str) -> None:
    registry.plan(f"^{stage} ", answer(503), times=100)
    with pytest.raises(Unavailable, match="503"):
        upload(registry)
    assert registry.count(f"^{stage} ") == QUICK.attempts


def test_parts_that_came_out_wrong_go_once_more_in_one(registry: TakingRegistry) -> None:
    def cut_off(connection: socket.socket, asked: Asked, good: bytes) -> bool:
        registry.kept = None
        return reset()(connection, asked, good)

    registry.kept = 1000
    registry.plan("^PATCH ", cut_off)
    registry.plan("^PUT ", answer(400))
    assert upload(registry) is Way.SENT
    assert methods(registry) == f"{BUSY} HEAD POST PATCH PUT"
    registry.content.clear()
    registry.asked.clear()
    registry.kept = 1000
    registry.plan("^PATCH ", cut_off)
    registry.plan("^PUT ", answer(400), times=100)
    with pytest.raises(Refused):
        upload(registry)
    assert methods(registry) == f"{BUSY} HEAD POST PATCH PUT"


@pytest.mark.parametrize("stage", ["POST", "PATCH", "PUT"])
def test_a_host_that_says_nothing_is_given_up(registry: TakingRegistry, stage: str) -> None:
    registry.plan(f"^{stage} ", stall(), times=100)
    with pytest.raises(Unavailable, match="does not answer"):
        upload(registry, access=Access(patience=replace(HURRIED, attempts=2)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_host_that_takes_nothing_is_given_up(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(32 << 20)
    monkeypatch.setattr(limits, "PUSH_WHOLE", len(data) if whole else 0)
    answers = {
        b"HEAD": response(404),
        b"POST": response(202, headers={"Location": "/v2/a/blobs/uploads/1"}),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for method in (b"HEAD", b"POST"):
                    assert connection.recv(10_000).startswith(method)
                    connection.sendall(answers[method])
                connection.recv(1)
                is_over.wait(30)

        is_over = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            to = FakeRegistry(port=listener.getsockname()[1])
            with pytest.raises(Unavailable, match="does not answer"):
                upload(to, data, access=Access(patience=replace(HURRIED, attempts=1)))
        finally:
            is_over.set()
            thread.join()


# -- who may ----------------------------------------------------------------------------------


def known(registry: TakingRegistry) -> Access:
    registry.user, registry.password = "user", "secret"
    return Access(credentials=lambda _host: Credential("user", "secret"), patience=QUICK)


def scopes(registry: FakeRegistry) -> list[list[str]]:
    asked = (one.target.partition("?")[2] for one in registry.asked if one.path == "/token")
    return [parse_qs(query)["scope"] for query in asked if query]


def test_a_token_is_for_writing_one_repository(registry: TakingRegistry) -> None:
    registry.realm = f"http://{registry.name}/token"
    assert upload(registry, access=known(registry)) is Way.SENT
    assert scopes(registry) == [["repository:a:pull,push"]]


def test_a_token_that_ends_within_a_part_is_renewed(registry: TakingRegistry) -> None:
    registry.realm = f"http://{registry.name}/token"

    def end(connection: socket.socket, _asked: Asked, _good: bytes) -> bool:
        registry.token = "token-2"
        connection.sendall(response(401, headers={"WWW-Authenticate": challenge}))
        return True

    challenge = f'Bearer realm="{registry.realm}",service="fake"'
    registry.kept = 5000
    registry.plan("^PATCH ", end)
    assert upload(registry, access=known(registry)) is Way.SENT
    assert registry.content[f"/a/blobs/{BLOB.digest}"][1] == DATA
    assert registry.count("/token") == 4  # each asked for by POST first


def test_who_may_only_read_is_told(registry: TakingRegistry) -> None:
    registry.plan("^POST .*uploads", answer(401))
    with pytest.raises(PermissionDenied, match="wants credentials"):
        upload(registry)
    registry.plan("^POST .*uploads", answer(403))
    with pytest.raises(PermissionDenied, match="does not let you write"):
        upload(registry)


@pytest.mark.parametrize("stage", ["POST", "PATCH", "PUT"])
def test_r02_nothing_goes_to_another_host(registry: TakingRegistry, stage: str) -> None:
    registry.realm = "basic"
    with TakingRegistry().running() as other:
        for status, place in ((202, "v2/a/blobs/uploads/1"), (307, "v2/a/x")):
            location = f"http://{other.name}/{place}"
            registry.plan(f"^{stage} ", answer(status, Location=location))
            with pytest.raises(Refused):
                upload(registry, access=known(registry))
        assert not other.asked


def test_r02_where_an_upload_may_be() -> None:
    origin = Origin("https", "a.example", 443)
    path = "/v2/a/blobs/uploads/"
    for location, place in (
        ("1?_state=x%3D", "/v2/a/blobs/uploads/1?_state=x%3D"),
        ("/up/1", "/up/1"),
        ("https://a.example/up/1", "/up/1"),
        ("https://A.example:443/up/1#part", "/up/1"),
    ):
        assert upload_place(origin, path, location) == place
    for location in (
        None,
        "",
        "http://a.example/up/1",
        "https://a.example:444/up/1",
        "https://b.example/up/1",
        "//b.example/up/1",
        "https://user@a.example/up/1",
        "file:///etc/passwd",
        "https://a.example/\r\nX: y",
    ):
        with pytest.raises(BadAnswer):
            upload_place(origin, path, location)


@pytest.mark.parametrize(
    ("text", "count"),
    [(None, 10), ("0-0", None), ("0-4", 5), ("bytes=0-9", 10), ("0-10", None), ("0-99999999", None)],
)
def test_how_much_a_host_has(text: str | None, count: int | None) -> None:
    assert received(text, 10) == count


@pytest.mark.parametrize("text", ["", "1-4", "bytes 0-4", "0--4", "0-4/10", "0-" + "9" * 20, "0-٤"])
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(BadAnswer):
        received(text, 10)


# -- what the registry has elsewhere ----------------------------------------------------------


def test_a_blob_of_another_repository_is_mounted(registry: TakingRegistry) -> None:
    registry.realm = f"http://{registry.name}/token"
    registry.put("b/c", "blobs", DATA, "x/y")
    assert upload(registry, elsewhere="b/c", access=known(registry)) is Way.MOUNTED
    assert registry.count("POST .*uploads/.mount=sha256:.*&from=b/c$") == 1
    assert registry.count("PATCH|PUT") == 0
    assert scopes(registry)[-1] == ["repository:a:pull,push", "repository:b/c:pull"]


@pytest.mark.parametrize(
    ("status", "then"),
    [
        (0, "HEAD POST PATCH PUT"),  # what was begun in its place is gone on with
        *((status, "HEAD POST POST PATCH PUT") for status in (400, 401, 403, 404, 405)),
        (503, "HEAD POST HEAD POST PATCH PUT"),
    ],
)
def test_what_cannot_be_mounted_is_sent(registry: TakingRegistry, status: int, then: str) -> None:
    registry.put("b", "blobs", DATA, "x/y")
    registry.mounts = False
    if status:
        registry.plan("^POST .*mount=", answer(status))
    assert upload(registry, elsewhere="b") is Way.SENT
    assert methods(registry) == then
