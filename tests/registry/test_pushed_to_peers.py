"""What lamina pushes and copies other tools pull, digest for digest; and only what is missing goes."""

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.kv.schema import EXTENT
from engine.oci.digest import digest_of
from engine.oci.reference import parse_reference
from engine.testing.archives import archive, layout, member
from engine.testing.fake_registry import FakeRegistry
from tests.command import lamina, lamina_json
from tests.compat.containerd import Containerd
from tests.compat.images import run
from tests.conftest import peer
from tests.engine.image_files import AMD64, ARM64, Files, config_of, docker_files, tar_of
from tests.registry.asking import with_client
from tests.registry.servers import PASSWORD, USER, Server, serving
from tests.registry.token_server import TokenServer, token_server

pytestmark = [pytest.mark.compat, pytest.mark.root]

LOWER = archive(member("etc/", "5", mode=0o750), member("etc/name", data=b"lower\n"))
UPPER = archive(member("etc/name", data=b"upper\n", mode=0o4755))
SKOPEO = ("--insecure-policy", "copy", "--src-tls-verify=false", "--preserve-digests", "--all")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that has `app`, an image of two layers."""
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", "--name", "app", layout(tmp_path / "app", [LOWER, UPPER]))
    return root


def pushed(root: Path, name: str) -> str:
    """Push `app`, and return the digest that it has there."""
    digest = lamina_json(root, "push", "app", name)["digest"]
    assert isinstance(digest, str)
    return digest


def meant(name: str) -> str:
    """Return what skopeo says that a name means."""
    skopeo = (peer("skopeo"), "inspect", "--tls-verify=false", "--format", "{{.Digest}}")
    return run(*skopeo, f"docker://{name}").strip()


def since(server: Server, before: int) -> list[str]:
    """Return the methods and kinds of what a registry was asked since."""
    return [f"{method} {status}" for method, _, status, _ in server.asked()[before:]]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_skopeo(compression: str, tmp_path: Path, plain: Server) -> None:
    source = layout(tmp_path / "source", [LOWER, UPPER], compression=compression)
    root, name = tmp_path / "root", f"{plain.name}/ours/{compression}:1"
    lamina(root, "import", "--no-unpack", "--name", "app", source)
    digest = pushed(root, name)
    run(peer("skopeo"), *SKOPEO, f"docker://{name}", f"oci:{tmp_path / 'back'}:latest")
    entry = json.loads((tmp_path / "back/index.json").read_text())["manifests"][0]
    assert entry["digest"] == digest == lamina_json(root, "images")[0]["digest"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "back/blobs/sha256").iterdir()} == {
        file.name: file.read_bytes() for file in (source / "blobs/sha256").iterdir()
    }


def test_skopeo_pulls_dockers_form(tmp_path: Path, plain: Server) -> None:
    root, name = tmp_path / "root", f"{plain.name}/ours/docker:1"
    saved = tar_of(tmp_path / "saved.tar", docker_files([LOWER, UPPER]))
    lamina(root, "import", "--no-unpack", "--name", "app", saved)
    assert pushed(root, name) == meant(name)
    run(peer("skopeo"), *SKOPEO, f"docker://{name}", f"dir:{tmp_path / 'back'}")


def test_podman(store: Path, tmp_path: Path, plain: Server, storage: Callable[..., str]) -> None:
    name = f"{plain.name}/ours/podman:1"
    digest = pushed(store, name)
    storage("podman", "pull", "-q", "--tls-verify=false", f"docker://{name}")
    told = tmp_path / "told"
    again = f"{plain.name}/podman/again:1"
    storage("podman", "push", "--tls-verify=false", "--digestfile", told, name, f"docker://{again}")
    assert digest == meant(name)


def test_ctr(store: Path, plain: Server, containerd: Containerd) -> None:
    name = f"{plain.name}/ours/ctr:1"
    digest = pushed(store, name)
    containerd.ctr("content", "fetch", "--plain-http", name)
    (line,) = (line for line in containerd.ctr("images", "ls").splitlines() if line.startswith(name))
    assert line.split()[2] == digest


def test_an_index(tmp_path: Path, plain: Server) -> None:
    files = Files()
    one = files.image([LOWER], compression="gzip")
    two = files.image([UPPER], compression="gzip", config={**config_of([UPPER]), **ARM64})
    index = files.index({**one, "platform": AMD64}, {**two, "platform": ARM64})
    source = files.tag(index, "latest").folder(tmp_path / "source")
    name, root = f"{plain.name}/ours/both:1", tmp_path / "root"
    target = f"docker://{name}"
    insecure = ("--insecure-policy", "copy", "--dest-tls-verify=false", "--all")
    run(peer("skopeo"), *insecure, f"oci:{source}:latest", target)
    lamina(root, "pull", "--no-unpack", "--all-platforms", name)
    for words in (("push", name), ("copy", name)):
        there = f"{plain.name}/ours/both-{words[0]}:1"
        assert lamina_json(root, *words, there)["digest"] == index["digest"]
        run(peer("skopeo"), *SKOPEO, f"docker://{there}", f"oci:{tmp_path / words[0]}:latest")


def test_what_refers_to_an_image(plain: Server, tmp_path: Path) -> None:
    """This registry has no list of it: a tag stands for that."""
    files = Files()
    app = files.image([LOWER], compression="gzip")
    signature = files.image(
        config={},
        layers=[files.blob(b"signature", "example/payload")],
        subject=app,
        artifactType="example/signature",
    )
    listed = files.index({**signature, "artifactType": "example/signature"})
    with FakeRegistry().running() as source:
        for name, data in files.files.items():
            entry = {one["digest"]: one for one in (app, signature, listed)}.get(digest_of(data))
            if entry:
                tag = {app["digest"]: "1", listed["digest"]: app["digest"].replace(":", "-")}
                source.put("a", "manifests", data, entry["mediaType"], tag.get(entry["digest"], ""))
            elif name.startswith("blobs/"):
                source.put("a", "blobs", data, "application/octet-stream")
        words = ("copy", "--referrers", f"{source.name}/a:1", f"{plain.name}/signed/copy:1")
        ways = [{part["way"] for part in lamina_json(tmp_path, *words)["parts"]} for _ in range(2)]
    assert ways == [{"sent"}, {"there"}]
    there = parse_reference(f"{plain.name}/signed/copy:1")
    (found,) = with_client(lambda client: client.referrers(there, app["digest"]))
    assert (found.digest, found.artifact_type) == (signature["digest"], "example/signature")
    meant(f"{plain.name}/signed/copy@{signature['digest']}")


def test_only_what_is_missing_goes(store: Path, tmp_path: Path, plain: Server) -> None:
    name = f"{plain.name}/missing/app:1"
    lamina(store, "push", "app", name)
    before = len(plain.asked())
    for _ in range(10):
        lamina(store, "push", "app", name)
    assert since(plain, before) == ["HEAD 200"] * 40

    # With a layer more it is that layer, its config and its manifest that go.
    above = layout(tmp_path / "more", [LOWER, UPPER, archive(member("third", data=b"3"))])
    lamina(store, "import", "--no-unpack", "--name", "more", above)
    before = len(plain.asked())
    parts = lamina_json(store, "push", "more", f"{plain.name}/missing/app:2")["parts"]
    assert sorted(part["way"] for part in parts) == ["sent", "sent", "sent", "there", "there"]
    assert since(plain, before).count("PUT 201") == 3

    # Another repository is given nothing but a manifest: it has the rest by name.
    before = len(plain.asked())
    parts = lamina_json(store, "push", "more", f"{plain.name}/missing/other:1")["parts"]
    assert sorted(part["way"] for part in parts) == ["mounted"] * 4 + ["sent"]
    asked = plain.asked()[before:]
    assert sum("mount=" in target and status == 201 for _, target, status, _ in asked) == 4
    assert [target for method, target, _, _ in asked if method == "PUT"] == [
        "/v2/missing/other/manifests/1"
    ]


# -- with TLS, a password, tokens -----------------------------------------------------------------


def log_in(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    auths = {server.name: {"username": USER, "password": PASSWORD}}
    (folder / "config.json").write_text(json.dumps({"auths": auths}))


def test_copies_between_registries(
    store: Path, tmp_path: Path, plain: Server, secure: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(tmp_path, secure, monkeypatch)
    hosts = tmp_path / "hosts"
    (hosts / secure.name).mkdir(parents=True)
    assert secure.certified
    text = f'server = "https://{secure.name}"\nca = "{secure.certified.ca}"\n'
    (hosts / secure.name / "hosts.toml").write_text(text)
    first, second, third = f"{plain.name}/a/a:1", f"{secure.name}/b/b:1", f"{plain.name}/c/c:1"
    digest = pushed(store, first)
    nowhere = tmp_path / "nowhere"
    for words in ((first, second), (second, third)):
        shown = lamina_json(nowhere, "copy", "--hosts-dir", hosts, *words)
        assert (shown["digest"], {part["way"] for part in shown["parts"]}) == (digest, {"sent"})
    assert not nowhere.exists()
    assert meant(third) == digest
    before = len(secure.asked())
    lamina(nowhere, "copy", "--hosts-dir", hosts, first, second)
    assert {"HEAD 200", "HEAD 401"} >= set(since(secure, before))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with token_server(tmp_path_factory.mktemp("tokens")) as server:
        yield server


@pytest.mark.parametrize("posts", [True, False], ids=["oauth2", "get"])
def test_tokens_that_the_registry_verifies(
    posts: bool,
    store: Path,
    tmp_path: Path,
    tokens: TokenServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "posts", posts)
    tokens.asked.clear()
    (tmp_path / "guarded").mkdir()
    with serving(tmp_path / "guarded", tokens.settings) as server:
        there = f"{server.name}/team/app:1"
        assert server.name in lamina(store, "push", "app", there, code=1).stderr
        log_in(tmp_path, server, monkeypatch)
        lamina(store, "push", "app", there)
        tokens.asked.clear()
        parts = lamina_json(store, "push", "app", f"{server.name}/team/other:1")["parts"]
        assert sorted(part["way"] for part in parts) == ["mounted"] * 3 + ["sent"]
        assert {asked["scope"] for _, asked in tokens.asked} == {
            "repository:team/other:pull,push",
            "repository:team/other:pull,push repository:team/app:pull",
        }


# -- what breaks off ------------------------------------------------------------------------------


@contextmanager
def cutting(server: Server, after: int) -> Iterator[str]:
    """Pass connections on to a registry, but cut the first off that sends so many bytes."""
    host, _, port = server.name.partition(":")
    is_cut = threading.Event()
    threads: list[threading.Thread] = []
    pairs: list[socket.socket] = []

    def carry(source: socket.socket, target: socket.socket, *, counted: bool) -> None:
        seen = 0
        with suppress(OSError):
            while data := source.recv(65536):
                seen += len(data)
                if counted and seen > after and not is_cut.is_set():
                    is_cut.set()
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection((host, int(port)))
                pairs.extend((client, upstream))
                for source, target, counted in ((client, upstream, True), (upstream, client, False)):
                    thread = threading.Thread(
                        target=carry, args=(source, target), kwargs={"counted": counted}
                    )
                    threads.append(thread)
                    thread.start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
            assert is_cut.is_set()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for end in pairs:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for end in pairs:
                end.close()


def test_a_push_that_is_cut_off_goes_on_or_begins_anew(tmp_path: Path, plain: Server) -> None:
    big = archive(member("big", data=random.Random("cut").randbytes(8 * EXTENT)))
    root = tmp_path / "root"
    source = layout(tmp_path / "big", [big], compression="none")
    lamina(root, "import", "--no-unpack", "--name", "app", source)
    with cutting(plain, 5 * EXTENT) as name:
        lamina(root, "push", "app", f"{name}/cut/app:1")
    run(peer("skopeo"), *SKOPEO, f"docker://{plain.name}/cut/app:1", f"oci:{tmp_path / 'back'}:latest")
