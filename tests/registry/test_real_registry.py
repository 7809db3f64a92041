"""Debian's docker-registry, set up in every way: what is there is pulled digest for digest."""

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import Refused
from engine.registry.client import Access
from engine.registry.credentials import Credential
from engine.registry.hosts import Host, Origin, Tls
from engine.testing.fake_registry import FakeRegistry, respond, response
from tests.command import lamina, lamina_json
from tests.registry.asking import QUICK, Served, read_blob, with_client
from tests.registry.servers import PASSWORD, USER, Certified, Server, push, serving
from tests.registry.token_server import REFRESH, TokenServer, token_server

pytestmark = [pytest.mark.compat, pytest.mark.root]

PAIR = f"{USER}:{PASSWORD}"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


def configure(hosts: Path, server: Server | str, text: str) -> Path:
    """Write the `hosts.toml` of a registry; return its folder."""
    folder = hosts / (server if isinstance(server, str) else server.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)
    return folder


def log_in(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def pulled(root: Path, hosts: Path, name: str) -> str:
    """Pull into a store and return the digest that it shows."""
    done = lamina_json(root, "pull", "--no-unpack", "--hosts-dir", hosts, name)
    return str(done["images"][0]["digest"])


def refused(root: Path, hosts: Path, name: str) -> str:
    return lamina(root, "pull", "--no-unpack", "--hosts-dir", hosts, name, code=1).stderr


# -- TLS ------------------------------------------------------------------------------------------


def test_cri_15_tls_of_a_private_ca_and_a_password(
    tmp_path: Path, hosts: Path, secure: Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(source, secure, "team/app:1", user=PAIR)
    root, name = tmp_path / "root", f"{secure.name}/team/app:1"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    server = f'server = "https://{secure.name}"\n'
    configure(hosts, secure, server)
    assert "certificate is not to be trusted" in refused(root, hosts, name)
    assert secure.certified
    configure(hosts, secure, f'{server}ca = "{secure.certified.ca}"\n')
    assert "wants a user and a password" in refused(root, hosts, name)
    log_in(tmp_path, auths={secure.name: {"username": USER, "password": "wrong"}})
    assert "does not let you read" in refused(root, hosts, name)
    log_in(tmp_path, auths={secure.name: {"username": USER, "password": PASSWORD}})
    assert pulled(root, hosts, name) == digest


def test_certified_clients(tmp_path: Path, certified: Certified, source: Path) -> None:
    """A registry for certified clients; whoever pulls has docker's files, or containerd's."""
    storage = tmp_path / "mutual"
    storage.mkdir()
    with serving(storage, certified=certified, clients=True) as server:
        digest = push(source, server, "team/app:1")
        reference = f"{server.name}/team/app:1"
        told = configure(tmp_path / "told", server, "")
        address = f'server = "https://{server.name}"\nca = "{certified.ca}"\n'
        files = [str(certified.folder / f"client.{kind}") for kind in ("pem", "key")]
        (told / "hosts.toml").write_text(address)
        wanted = refused(tmp_path / "root", told.parent, reference)
        assert "wants a certificate of ours" in wanted
        for client in (json.dumps([files]), json.dumps(_joined(tmp_path, files))):
            (told / "hosts.toml").write_text(f"{address}client = {client}\n")
            assert pulled(tmp_path / "root", told.parent, reference) == digest
        folder = tmp_path / "docker" / server.name
        folder.mkdir(parents=True)
        for file, target in (("ca.pem", "ca.crt"), ("client.pem", "a.cert"), ("client.key", "a.key")):
            (folder / target).write_bytes((certified.folder / file).read_bytes())
        assert pulled(tmp_path / "other", folder.parent, reference) == digest


def _joined(folder: Path, files: list[str]) -> str:
    """Return a file with a certificate and its key."""
    joined = folder / "both.pem"
    joined.write_text("".join(Path(file).read_text() for file in files))
    return str(joined)


def test_r01_r03_r05_what_has_tls_leads_to_nothing_without(certified: Certified) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certified.folder / "host.pem", certified.folder / "host.key")
    with FakeRegistry(context=context).running() as registry, FakeRegistry().running() as other:
        served = Served(registry)
        origin = Origin("https", "127.0.0.1", registry.port)
        hosts = [Host(origin=origin, tls=Tls(ca=(str(certified.ca),)))]
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


# -- credentials ----------------------------------------------------------------------------------


def test_a_password_from_a_program(
    tmp_path: Path, hosts: Path, secure: Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(source, secure, "team/kept:1", user=PAIR)
    assert secure.certified
    configure(hosts, secure, f'server = "https://{secure.name}"\nca = "{secure.certified.ca}"\n')
    answer = json.dumps({"ServerURL": secure.name, "Username": USER, "Secret": PASSWORD})
    program = tmp_path / "docker-credential-of-the-tests"
    program.write_text(f"#!/bin/sh\ntest $(cat) = {secure.name} && echo '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    root, name = tmp_path / "root", f"{secure.name}/team/kept:1"
    for config in ({"credHelpers": {secure.name: "of-the-tests"}}, {"credsStore": "of-the-tests"}):
        log_in(tmp_path, **config)
        assert pulled(root, hosts, name) == digest
    log_in(tmp_path, credHelpers={secure.name: "not-there"})
    assert (
        "docker-credential-not-there" in lamina(root, "pull", "--hosts-dir", hosts, name, code=6).stderr
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with token_server(tmp_path_factory.mktemp("tokens")) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("guarded"), tokens.settings) as server:
        yield server


@pytest.mark.parametrize("posts", [True, False], ids=["oauth2", "get"])
def test_tokens_that_the_registry_verifies(
    posts: bool,
    tmp_path: Path,
    hosts: Path,
    guarded: Server,
    tokens: TokenServer,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "posts", True)
    digests = {name: push(source, guarded, name, user=PAIR) for name in ("public/app:1", "team/app:1")}
    monkeypatch.setattr(tokens, "posts", posts)
    tokens.asked.clear()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    root = tmp_path / "root"
    # Whoever it is may read what is public; what is not is refused with the registry's own words.
    assert pulled(root, hosts, f"{guarded.name}/public/app:1") == digests["public/app:1"]
    assert len(tokens.asked) == 1  # one token for all of an image
    denied = refused(tmp_path / "empty", hosts, f"{guarded.name}/team/app:1")
    assert guarded.name in denied
    entries = [{"username": USER, "password": PASSWORD}]
    if posts:
        entries += [{"identitytoken": REFRESH}]
    for entry in entries:
        log_in(tmp_path, auths={guarded.name: entry})
        assert pulled(root, hosts, f"{guarded.name}/team/app:1") == digests["team/app:1"]
    log_in(tmp_path, auths={guarded.name: {"username": USER, "password": "wrong"}})
    assert "gives out no token" in refused(tmp_path / "empty", hosts, f"{guarded.name}/team/app:1")
    assert {asked["scope"] for _, asked in tokens.asked} == {
        "repository:public/app:pull",
        "repository:team/app:pull",
    }


# -- in front of another --------------------------------------------------------------------------


def blobs_sent(server: Server) -> int:
    """Return how often a blob left a registry."""
    return sum("/blobs/" in target and method == "GET" for method, target, _, _ in server.asked())


def test_a_cache_as_mirror(tmp_path: Path, hosts: Path, plain: Server, source: Path) -> None:
    name = f"{plain.name}/team/cached:1"
    digest = push(source, plain, "team/cached:1")
    (tmp_path / "cache").mkdir()
    upstream = {"proxy": {"remoteurl": f"http://{plain.name}"}}
    server = f'server = "http://{plain.name}"\n'
    with serving(tmp_path / "cache", upstream) as cache:
        configure(hosts, plain, f'{server}[host."http://{cache.name}"]\n')
        assert pulled(tmp_path / "first", hosts, name) == digest
        assert blobs_sent(cache) == 3
        before = blobs_sent(plain)
        assert pulled(tmp_path / "second", hosts, name) == digest
        assert blobs_sent(cache) == 6
        assert blobs_sent(plain) == before  # the cache has them now
    # It is down: the registry is asked itself, and what is there is not fetched again.
    assert pulled(tmp_path / "second", hosts, name) == digest
    assert blobs_sent(plain) == before
    assert pulled(tmp_path / "third", hosts, name) == digest
    assert blobs_sent(plain) == before + 3


def test_a_mirror_for_blobs_alone(tmp_path: Path, hosts: Path, plain: Server, source: Path) -> None:
    """What a tag means the registry says, what is there the cache: a name that moved is seen at once."""
    name = f"{plain.name}/team/moving:1"
    digest = push(source, plain, "team/moving:1")
    (tmp_path / "cache").mkdir()
    with serving(tmp_path / "cache", {"proxy": {"remoteurl": f"http://{plain.name}"}}) as cache:
        mirror = f'[host."http://{cache.name}"]\ncapabilities = ["pull"]\n'
        configure(hosts, plain, f'server = "http://{plain.name}"\n{mirror}')
        assert pulled(tmp_path / "root", hosts, name) == digest
        moved = push(source, plain, "team/moving:1", "--format", "v2s2")
        assert moved != digest
        assert pulled(tmp_path / "root", hosts, name) == moved
        assert not [target for _, target, _, _ in cache.asked() if "/manifests/1" in target]
