"""R-10: where names lead, by a resolver that changes its mind; hosts that some addresses reach."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpcore
import pytest
import trio

from engine import limits
from engine.errors import Refused, Unavailable
from engine.registry import network
from engine.registry.addresses import is_open, is_open_with_secrets, parse_address
from engine.registry.client import Access, open_client
from engine.registry.hosts import default_host
from engine.registry.network import Names
from engine.testing.fake_registry import FakeRegistry, respond, response
from tests.registry.asking import HURRIED, QUICK, Served, read_blob

INSIDE = "169.254.169.254"


@dataclass
class Resolver(trio.abc.HostnameResolver):
    """Names by what each question is answered with in turn; the last answer stays."""

    answers: dict[str, list[list[str] | OSError]]
    asked: list[str] = field(default_factory=list)

    async def getaddrinfo(self, host: Any, port: Any, *about: Any, **more: Any) -> Any:
        name = host.decode()
        self.asked.append(name)
        answers = self.answers[name]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        resolve = partial(socket.getaddrinfo, port=port, type=socket.SOCK_STREAM)
        return [found for address in answer for found in resolve(address)]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


def resolving(resolver: Resolver, work: Callable[[], Any]) -> Any:
    async def run() -> Any:
        trio.socket.set_custom_hostname_resolver(resolver)
        return await work()

    return trio.run(run)


@pytest.fixture
def served(registry: FakeRegistry) -> Served:
    return Served(registry)


@pytest.fixture
def other(registry: FakeRegistry, served: Served) -> Iterator[FakeRegistry]:
    """Where the registry's blobs are said to be, by name."""
    with FakeRegistry(content=registry.content).running() as running:
        location = {"Location": f"http://cdn.example:{running.port}/v2/a/blobs/"}
        location["Location"] += served.layers[0].digest
        registry.plan("blobs", respond(response(307, headers=location)), times=99)
        yield running


def read(resolver: Resolver, served: Served, times: int = 1, **changes: Any) -> bytes:
    """Read a layer so often, over connections of their own."""
    registry = served.registry
    hosts = [replace(default_host(f"r.example:{registry.port}", plain_http=True))]
    access = replace(Access(patience=QUICK, hosts=lambda _domain: hosts), **changes)

    async def work() -> bytes:
        found = b""
        async with open_client(access) as client:
            for _ in range(times):
                found = await read_blob(client, served, served.layers[0])
                for shared in client.asking._connections._pools.values():
                    await shared.pool.aclose()
        return found

    result = resolving(resolver, work)
    assert isinstance(result, bytes)
    return result


HERE: list[list[str] | OSError] = [["127.0.0.1"]]


def test_r10_a_redirect_by_name_to_metadata(served: Served, other: FakeRegistry) -> None:
    resolver = Resolver({"r.example": HERE, "cdn.example": [[INSIDE]]})
    with pytest.raises(Refused, match=r"leads to cdn\.example \(169\.254\.169\.254\)"):
        read(resolver, served)
    assert not other.asked


def test_r10_only_the_good_addresses_of_a_name_are_asked(served: Served, other: FakeRegistry) -> None:
    resolver = Resolver({"r.example": HERE, "cdn.example": [[INSIDE, "127.0.0.1", "::ffff:a9fe:a9fe"]]})
    assert read(resolver, served)
    assert other.asked


def test_r10_a_name_that_is_bound_anew_leads_where_it_did(served: Served, other: FakeRegistry) -> None:
    resolver = Resolver({"r.example": HERE, "cdn.example": [["127.0.0.1"], [INSIDE]]})
    assert read(resolver, served, times=3)
    assert resolver.asked == ["r.example", "cdn.example"]
    assert len(other.asked) == 3


def test_r10_a_name_that_is_bound_anew_later_is_held_against_the_policy_again(
    served: Served, other: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PINNED_S", 0)
    resolver = Resolver({"r.example": HERE, "cdn.example": [["127.0.0.1"], [INSIDE]]})
    with pytest.raises(Refused, match="nobody outside may lead"):
        read(resolver, served, times=3)
    assert len(other.asked) == 1


def test_r10_a_policy_of_ones_own(served: Served, other: FakeRegistry) -> None:
    seen = []

    def none(address: object) -> bool:
        seen.append(str(address))
        return False

    resolver = Resolver({"r.example": [["127.0.0.1"]], "cdn.example": [["192.0.2.1"]]})
    with pytest.raises(Refused, match="nobody outside may lead"):
        read(resolver, served, may_lead_to=none)
    assert seen == ["192.0.2.1"]  # what the configuration names is not held against it


def test_r03_a_token_server_whose_name_leads_inside(served: Served, registry: FakeRegistry) -> None:
    registry.realm = f"http://auth.example:{registry.port}/token"
    resolver = Resolver({"r.example": HERE, "auth.example": [[INSIDE]]})
    with pytest.raises(Refused, match="nobody outside may lead"):
        read(resolver, served)
    assert registry.count("/token") == 0
    resolver.answers["auth.example"] = [["127.0.0.1"], [INSIDE]]
    life = json.dumps({"token": "token-1"}).encode()
    registry.plan("/token", respond(response(200, life)), times=9)
    assert read(resolver, served, times=3)


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "0.0.0.0", "::ffff:127.0.0.1", INSIDE, "fe80::1"])
def test_r10_of_what_is_here_only_what_is_here_may_be_named(where: str) -> None:
    resolver = Resolver(
        {"far": [["192.0.2.1"]], "near": [["127.0.0.1", "::1"]], "both": [["192.0.2.1", "::1"]],
         "named": [[where]]}
    )  # fmt: skip

    async def work() -> None:
        names = Names(is_open)
        assert await names.addresses("named", "")
        for by in ("far", "both"):
            with pytest.raises(Refused, match="nobody outside"):
                await names.addresses("named", by)
        if "127" in where or where == "::1":
            assert await names.addresses("named", "near")
        else:
            with pytest.raises(Refused, match="nobody outside"):
                await names.addresses("named", "near")

    resolving(resolver, work)


def test_r10_two_who_ask_at_once_are_led_to_the_same_place() -> None:
    resolver = Resolver({"x": [["192.0.2.1"], ["192.0.2.2"]]})
    found: list[tuple[str, ...]] = []

    async def work() -> None:
        names = Names(is_open)

        async def ask() -> None:
            found.append(await names.addresses("x", ""))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)

    resolving(resolver, work)
    assert {*found} == {("192.0.2.1",)}


CLOSED = [
    "127.0.0.1", "127.1.2.3", "::1", "0.0.0.0", "::", "169.254.169.254", "fe80::1", "fe80::1%1",
    "224.0.0.1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16",
]  # fmt: skip
PRIVATE = ["10.0.0.1", "192.168.1.1", "172.16.0.1", "fd00::1", "100.64.0.1", "::ffff:10.0.0.1"]


@pytest.mark.parametrize("text", [*CLOSED, *PRIVATE, "192.88.99.1", "8.8.8.8", "2606:4700::1"])
def test_r10_addresses(text: str) -> None:
    address = parse_address(text)
    assert address
    assert is_open(address) == (text not in CLOSED)
    assert is_open_with_secrets(address) == (text not in CLOSED + PRIVATE)


@pytest.mark.parametrize("text", ["r.example", "1", "0x7f.1", "2130706433", ""])
def test_r10_names_are_no_addresses(text: str) -> None:
    assert parse_address(text) is None


# -- names that lead nowhere ----------------------------------------------------------------------


def test_a_name_that_nobody_knows(served: Served, registry: FakeRegistry) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    resolver = Resolver({"r.example": [unknown]})
    with pytest.raises(Unavailable, match=r"r\.example:\d+ cannot be reached.* not known"):
        read(resolver, served)
    assert len(resolver.asked) == limits.ATTEMPTS
    # One that is known after all is asked.
    busy = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert read(Resolver({"r.example": [busy, ["127.0.0.1"]]}), served)


@contextmanager
def black_hole(port: int) -> Iterator[None]:
    """Have nobody answer at ::1: as many wait there to be accepted as the kernel takes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6))
        listener.bind(("::1", port))
        listener.listen(0)
        for _ in range(2):
            one = stack.enter_context(socket.socket(socket.AF_INET6))
            one.setblocking(False)
            one.connect_ex(("::1", port))
        yield


def test_an_ipv6_black_hole(
    served: Served, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_NEXT_S", 0.01)
    with black_hole(registry.port):
        assert read(Resolver({"r.example": [["::1", "127.0.0.1"]]}), served)
        with pytest.raises(Unavailable, match="cannot be reached"):
            read(Resolver({"r.example": [["::1"]]}), served, patience=HURRIED)


def test_an_address_that_refuses_is_passed_over_at_once(served: Served, registry: FakeRegistry) -> None:
    assert read(Resolver({"r.example": [["127.0.0.2", "127.0.0.3", "127.0.0.1"]]}), served)


def test_a_name_is_asked_for_anew_where_nobody_answers_any_more(
    served: Served, registry: FakeRegistry
) -> None:
    resolver = Resolver({"r.example": [["127.0.0.2"], ["127.0.0.1"]]})
    assert read(resolver, served)
    assert resolver.asked == ["r.example"] * 2


def test_a_connection_that_nobody_wants_any_more_is_closed(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = trio.CancelScope()
    there = []
    connect = httpcore.TrioBackend.connect_tcp

    async def late(self: Any, host: str, port: int, **more: Any) -> httpcore.AsyncNetworkStream:
        there.append(await connect(self, host, port, **more))
        scope.cancel()
        return there[0]

    monkeypatch.setattr(httpcore.TrioBackend, "connect_tcp", late)

    async def run() -> None:
        with scope:
            await network._Backend(Names(is_open), "").connect_tcp("127.0.0.1", registry.port)
        assert there[0].get_extra_info("socket").fileno() == -1

    trio.run(run)
