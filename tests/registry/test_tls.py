"""Hosts that do not prove who they are, or whose TLS breaks: nothing is said to them, or lost."""

import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError, PermissionDenied
from engine.registry.client import Access
from engine.registry.credentials import Credential
from engine.registry.hosts import Host, Origin, Tls
from engine.testing.fake_registry import Asked, FakeRegistry, respond, response
from tests.registry.asking import QUICK, Served, read_blob, with_client
from tests.registry.servers import Certified, certificates

HERE = "subjectAltName=IP:127.0.0.1"


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certificates(tmp_path_factory.mktemp("ca"))


def context(certificate: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return made


@pytest.fixture
def registry(certified: Certified) -> Iterator[FakeRegistry]:
    with FakeRegistry(context=context(certified.folder / "host.pem")).running() as running:
        yield running


def access(registry: FakeRegistry, certified: Certified | None) -> Access:
    trusted = (str(certified.ca),) if certified else ()
    host = Host(origin=Origin("https", "127.0.0.1", registry.port), tls=Tls(ca=trusted))
    return Access(
        patience=QUICK, hosts=lambda _domain: [host], credentials=lambda _host: Credential("u", "p")
    )


@pytest.fixture
def others(certified: Certified, tmp_path: Path) -> dict[str, Path]:
    """Return certificates that prove nothing."""
    stranger = certificates(tmp_path)
    return {
        "of an unknown CA": stranger.folder / "host.pem",
        "expired": certified.signed("expired", "-addext", HERE, days=-1),
        "of another host": certified.signed("elsewhere", "-addext", "subjectAltName=IP:127.0.0.9"),
        "of another name": certified.signed("named", "-addext", "subjectAltName=DNS:localhost"),
        "of a client": certified.signed(
            "alien", "-addext", HERE, "-addext", "extendedKeyUsage=clientAuth"
        ),
    }


@pytest.mark.parametrize(
    ("what", "says"),
    [("of an unknown CA", "unable to get local issuer"), ("expired", "expired"),
     ("of another host", "mismatch"), ("of another name", "mismatch"), ("of a client", "purpose")],
)  # fmt: skip
def test_certificates_that_prove_nothing(
    what: str, says: str, certified: Certified, others: dict[str, Path], registry: FakeRegistry
) -> None:
    with FakeRegistry(context=context(others[what])).running() as lying:
        served = Served(lying)
        with pytest.raises(PermissionDenied, match=f"certificate is not to be trusted: .*{says}"):
            with_client(lambda client: client.resolve(served.reference), access(lying, certified))
        assert not lying.asked
        # Nor where one that is trusted leads there.
        served = Served(registry)
        lying.content.update(registry.content)
        location = f"https://{lying.name}/v2/a/blobs/{served.layers[0].digest}"
        registry.plan("blobs", respond(response(307, headers={"Location": location})), times=9)
        with pytest.raises(PermissionDenied, match=says):
            with_client(
                lambda client: read_blob(client, served, served.layers[0]), access(registry, certified)
            )
        assert not lying.asked


def alert(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
    """Send an alert that nobody's key made after half of the answer."""
    connection.sendall(good[: len(good) // 2])
    os.write(connection.fileno(), b"\x15\x03\x03\x00\x02\x02\x28")
    return False


def notified(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
    """End TLS in order after half of the answer."""
    connection.sendall(good[: len(good) // 2])
    assert isinstance(connection, ssl.SSLSocket)
    connection.unwrap()
    return False


def torn(connection: socket.socket, _asked: Asked, good: bytes) -> bool:
    """End the connection, but not TLS, after half of the answer."""
    connection.sendall(good[: len(good) // 2])
    return False


@pytest.mark.parametrize("stage", ["manifests/1", "blobs/"])
@pytest.mark.parametrize("fault", [alert, notified, torn])
def test_tls_that_ends_in_the_middle(
    fault: Any, stage: str, certified: Certified, registry: FakeRegistry
) -> None:
    served = Served(registry)

    async def read(client: Any) -> bytes:
        found = await client.resolve(served.reference)
        assert found.descriptor == served.manifest
        config: bytes = await client.document(served.reference, served.config, 10_000)
        return config

    registry.plan(stage, fault)
    assert with_client(read, access(registry, certified))
    assert registry.count(stage) == 2


def test_a_handshake_that_never_ends(certified: Certified) -> None:
    # It speaks no TLS at all, and says so.
    with FakeRegistry().running() as plain:
        served = Served(plain)
        with pytest.raises(EngineError, match=plain.name):
            with_client(lambda client: client.resolve(served.reference), access(plain, certified))
        assert not plain.count("^(GET|HEAD) ")  # what it says may look like some request
