"""Debian's docker-registry serves what skopeo pushed: pulled digest for digest, plain and with TLS."""

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.errors import Refused
from engine.registry.client import Access
from engine.registry.credentials import Credential
from engine.registry.hosts import Host, Origin, Tls
from engine.testing.archives import archive, layout, member
from engine.testing.fake_registry import FakeRegistry, respond, response
from tests.command import lamina, lamina_json
from tests.compat.images import assert_same, our_tree, run, umoci_tree
from tests.conftest import peer
from tests.registry.asking import QUICK, Served, read_blob, with_client

pytestmark = [pytest.mark.compat, pytest.mark.root]

USER, PASSWORD = "user", "s3cr3t"
_BCRYPT = "$2b$05$abcdefghijklmnopqrstuu9Avu/WgbsK7g7xfCY1X3pdjsTgxqQLS"  # of PASSWORD
_START_S = 30


@dataclass(frozen=True)
class Server:
    name: str
    ca: Path | None = None


def _certificates(folder: Path) -> None:
    """Make a CA, and what it says of 127.0.0.1."""
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl = peer("openssl")
    ca = ("-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-subj", "/CN=test CA", "-days", 2)
    run(openssl, "req", "-x509", *new, *ca)
    wanted = ("-keyout", folder / "host.key", "-out", folder / "host.csr", "-subj", "/CN=host")
    run(openssl, "req", *new, *wanted, "-addext", "subjectAltName=IP:127.0.0.1")
    signing = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", 2)
    given = ("-in", folder / "host.csr", "-out", folder / "host.pem", "-copy_extensions", "copy")
    run(openssl, "x509", "-req", *given, *signing)


@contextmanager
def _serving(folder: Path, *, secure: bool) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    http: dict[str, object] = {"addr": f"127.0.0.1:{port}"}
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "http": http,
    }
    if secure:
        _certificates(folder)
        (folder / "htpasswd").write_text(f"{USER}:{_BCRYPT}\n")
        http["tls"] = {"certificate": str(folder / "host.pem"), "key": str(folder / "host.key")}
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    file = folder / "config.yml"
    file.write_text(json.dumps(config))  # which YAML is a superset of
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([peer("docker-registry"), "serve", file], stdout=log, stderr=log)
    try:
        _await(port, server)
        yield Server(f"127.0.0.1:{port}", folder / "ca.pem" if secure else None)
    finally:
        server.kill()
        server.wait()


def _await(port: int, server: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert server.poll() is None, "docker-registry ended"
            assert time.monotonic() < until, "docker-registry does not listen"
            time.sleep(0.01)
        else:
            return


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with _serving(tmp_path_factory.mktemp("plain"), secure=False) as server:
        yield server


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with _serving(tmp_path_factory.mktemp("secure"), secure=True) as server:
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    base = archive(
        member("etc/", "5"), member("etc/name", data=b"lower\n"), member("etc/gone", data=b"x")
    )
    above = archive(member("etc/name", data=b"upper\n"), member("etc/.wh.gone"))
    return layout(tmp_path / "source", [base, above])


def push(source: Path, server: Server, name: str, *options: object) -> str:
    """Push an image with skopeo, and return the digest of its manifest there."""
    folder = server.ca.parent if server.ca else None
    trust: Sequence[object] = ("--dest-cert-dir", _trusting(folder)) if folder else ()
    trust = trust or ("--dest-tls-verify=false",)
    told = source.with_name("pushed")
    credentials = ("--dest-creds", f"{USER}:{PASSWORD}") if folder else ()
    skopeo = (peer("skopeo"), "--insecure-policy", "copy", "--digestfile", told)
    run(
        *skopeo, *trust, *credentials, *options, f"oci:{source}:latest", f"docker://{server.name}/{name}"
    )
    return told.read_text().strip()


def _trusting(folder: Path) -> Path:
    found = folder / "certs"
    found.mkdir(exist_ok=True)
    (found / "ca.crt").write_bytes((folder / "ca.pem").read_bytes())
    return found


@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_what_skopeo_pushed(form: str, tmp_path: Path, plain: Server, source: Path) -> None:
    digest = push(source, plain, f"team/{form}:1", "--format", form)
    root, name = tmp_path / "root", f"{plain.name}/team/{form}:1"
    (image,) = lamina_json(root, "pull", "--snapshotter", "overlay", name)["images"]
    assert image["digest"] == digest
    tree = our_tree(root, name, "overlay", tmp_path / "mnt")
    assert_same(tree, umoci_tree(source, tmp_path / "umoci"), "umoci")
    by_digest = f"{plain.name}/team/{form}@{digest}"
    assert lamina_json(root, "pull", "--no-unpack", by_digest)["images"][0]["name"] == by_digest
    assert lamina_json(root, "gc")["blobs"] == []


def test_tls_of_a_private_ca_and_a_password(
    tmp_path: Path, secure: Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(source, secure, "team/app:1")
    root, name = tmp_path / "root", f"{secure.name}/team/app:1"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    folder = tmp_path / "hosts" / secure.name
    folder.mkdir(parents=True)
    hosts = folder / "hosts.toml"
    words = ("pull", "--no-unpack", "--hosts-dir", folder.parent, name)

    hosts.write_text(f'server = "https://{secure.name}"\n')
    assert "certificate is not to be trusted" in lamina(root, *words, code=1).stderr
    hosts.write_text(f'server = "https://{secure.name}"\nca = "{secure.ca}"\n')
    assert "wants a user and a password" in lamina(root, *words, code=1).stderr
    for password, code in (("wrong", 1), (PASSWORD, 0)):
        auth = {"username": USER, "password": password}
        (tmp_path / "config.json").write_text(json.dumps({"auths": {secure.name: auth}}))
        lamina(root, *words, code=code)
    assert lamina_json(root, "images")[0]["digest"] == digest


def test_r01_r03_what_has_tls_leads_to_nothing_without(tmp_path: Path) -> None:
    _certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "host.pem", tmp_path / "host.key")
    with FakeRegistry(context=context).running() as registry, FakeRegistry().running() as other:
        served = Served(registry)
        origin = Origin("https", "127.0.0.1", registry.port)
        hosts = [Host(origin=origin, tls=Tls(ca=(str(tmp_path / "ca.pem"),)))]
        access = Access(
            hosts=lambda _domain: hosts,
            credentials=lambda _host: Credential(USER, PASSWORD),
            patience=QUICK,
        )
        assert with_client(lambda client: client.resolve(served.reference), access)
        location = {"Location": f"http://{other.name}/v2/x"}
        registry.plan("blobs", respond(response(307, headers=location)))
        with pytest.raises(Refused, match="from https to http"):
            with_client(lambda client: read_blob(client, served, served.layers[0]), access)
        registry.realm = f"http://{other.name}/token"
        with pytest.raises(Refused, match="without TLS"):
            with_client(lambda client: client.resolve(served.reference), access)
        assert not other.asked
