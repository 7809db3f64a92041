"""What registries, config files and programs say, read: challenges, credentials, hosts, answers."""

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.errors import (
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Refused,
    Unavailable,
)
from engine.registry.challenge import parse_challenges
from engine.registry.credentials import Credential, parse_docker_config
from engine.registry.hosts import Capability, Origin, default_host, folder_names, parse_hosts, parse_url
from engine.registry.hosts_folder import HostsFolder, trust
from engine.registry.keychain import Keychain
from engine.registry.protocol import (
    BadAnswer,
    content_length,
    document_type,
    explained,
    next_page,
    part,
    redirected,
    stated_digest,
)
from engine.registry.retrying import Busy, Patience, parse_retry_after

HERE = Origin("https", "a.example", 443)


# -- challenges (R-06) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (['Bearer realm="https://x/t",service="s",scope="repository:a:pull,push"'],
         [("bearer", {"realm": "https://x/t", "service": "s", "scope": "repository:a:pull,push"})]),
        (["Basic realm=x"], [("basic", {"realm": "x"})]),
        (['Basic realm="a, b", Bearer realm="c"'],
         [("basic", {"realm": "a, b"}), ("bearer", {"realm": "c"})]),
        (["Basic realm=x", 'BEARER REALM = "q\\"q"'],
         [("basic", {"realm": "x"}), ("bearer", {"realm": 'q"q'})]),
        (["Negotiate abc==", "Basic"], [("negotiate", {"abc": "="}), ("basic", {})]),
        (['Bearer realm="a",realm="b"'], []),
        (['Bearer realm="a\r\nX: y"'], []),
        (['Bearer realm="ü"'], []),
        (['Bearer realm="open'], [("bearer", {})]),
        (["", ",,,", "="], []),
        (["Basic " + "a=b," * 20_000], []),
        (["Basic " + ",".join(f"a{n}=b" for n in range(1000))], []),
    ],
)  # fmt: skip
def test_r06_challenges(headers: list[str], found: list[tuple[str, dict[str, str]]]) -> None:
    assert [(one.scheme, one.parameters) for one in parse_challenges(headers)] == found


@given(st.text(alphabet=st.sampled_from('Bearer Basic="\\, \t\r\nxü'), max_size=60))
def test_r06_any_header_is_read_without_an_error(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme.isascii()
        assert len(challenge.parameters) <= limits.CHALLENGE_PARAMETERS


# -- credentials ----------------------------------------------------------------------------------


def config(**members: object) -> bytes:
    return json.dumps(members).encode()


def encoded(pair: str) -> str:
    return base64.b64encode(pair.encode()).decode()


def test_credentials_of_docker_are_found_by_host() -> None:
    found = parse_docker_config(
        config(
            auths={
                "https://index.docker.io/v1/": {"auth": encoded("hub:a:b")},
                "r.example:5000": {"auth": encoded("u:p"), "email": "x"},
                "https://old.example/v1/": {"auth": encoded("o:p")},
                "i.example": {"auth": encoded("u:"), "identitytoken": "secret-identity"},
                "empty.example": {},
            },
            credHelpers={"h.example": "one"},
            credsStore="all",
            unknown=[1],
        ),
        "config.json",
    )
    assert found.credential("registry-1.docker.io") == Credential("hub", "a:b")
    assert found.credential("r.example:5000") == Credential("u", "p")
    assert found.credential("old.example") == Credential("o", "p")
    assert found.credential("i.example") == Credential("u", "secret-identity", is_identity=True)
    # no credential is anybody else's.
    for other in ("r.example", "r.example:5001", "x.r.example", "empty.example"):
        assert found.credential(other) is None
    assert found.for_host("h.example") == ("docker-credential-one", "h.example")
    hub = ("docker-credential-all", "https://index.docker.io/v1/")
    assert found.for_host("registry-1.docker.io") == hub
    #
    assert "secret" not in repr(found)
    assert "a:b" not in repr(found.credential("docker.io"))


def test_null_is_empty_as_in_go() -> None:
    found = parse_docker_config(b'{"auths": null, "credHelpers": null}', "it")
    assert (found.credential("a"), found.for_host("a")) == (None, ("", "a"))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"auths": 1}', config(auths={"a": {"auth": "%%s3cr3t"}}), config(credsStore="../x"),
     config(credHelpers={"a": "x y"}), config(auths={"a": {"auth": encoded("u:s3cr3t\r\nX: y")}})],
)  # fmt: skip
def test_a_malformed_config_is_refused_without_a_word_of_it(data: bytes) -> None:
    with pytest.raises(Refused) as error:
        parse_docker_config(data, "config.json")
    assert "s3cr3t" not in str(error.value)


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Keychain:
    file = folder / "docker-credential-test"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    (folder / "config.json").write_bytes(config(credsStore="test"))
    return Keychain(folder / "config.json")


def test_programs_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = program(
        tmp_path, monkeypatch, 'read host; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"$host\\"}"'
    )
    assert ask("r.example:5000") == Credential("u", "r.example:5000")
    ask = program(tmp_path, monkeypatch, 'echo \'{"Username": "<token>", "Secret": "s"}\'')
    assert ask("r.example") == Credential("", "s", is_identity=True)
    ask = program(tmp_path, monkeypatch, "echo credentials not found in native keychain; exit 1")
    assert ask("r.example") is None


@pytest.mark.parametrize(
    ("script", "kind"),
    [("echo secret; exit 3", PermissionDenied), ("echo secret", Refused), ("echo '[1]'", Refused),
     ("exec sleep 60", Unavailable)],
)  # fmt: skip
def test_programs_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[EngineError]
) -> None:
    monkeypatch.setattr(limits, "CREDENTIAL_PROGRAM_S", 0.5 if "sleep" in script else 30)
    with pytest.raises(kind) as error:
        program(tmp_path, monkeypatch, script)("r.example")
    assert "secret" not in str(error.value)


def test_a_keychain_without_its_file_or_program(tmp_path: Path) -> None:
    assert Keychain(tmp_path / "none")("r.example") is None
    (tmp_path / "config.json").write_bytes(config(credHelpers={"r.example": "not-installed"}))
    with pytest.raises(FailedPrecondition, match="docker-credential-not-installed is not installed"):
        Keychain(tmp_path / "config.json")("r.example")


# -- hosts ----------------------------------------------------------------------------------------


def test_default_hosts() -> None:
    assert str(default_host("docker.io").origin) == "https://registry-1.docker.io"
    assert str(default_host("r.example").origin) == "https://r.example"
    assert str(default_host("r.example:5000").origin) == "https://r.example:5000"
    assert str(default_host("r.example", plain_http=True).origin) == "http://r.example"
    # As in containerd, what is on this machine needs no TLS.
    assert str(default_host("localhost:5000").origin) == "http://localhost:5000"
    assert str(default_host("[::1]:5000").origin) == "http://[::1]:5000"
    assert str(default_host("127.0.0.1:443").origin) == "https://127.0.0.1"


@pytest.mark.parametrize("domain", ["a:99999", "a:0", "[::1", "a:b"])
def test_r08_a_domain_that_is_no_host_is_refused(domain: str) -> None:
    with pytest.raises(Refused):
        default_host(domain)


def test_hosts_as_containerd_has_them() -> None:
    text = """
    server = "https://r.example"
    ca = "ca.pem"
    [host."https://mirror.example:8443"]
      capabilities = ["pull", "resolve"]
      ca = ["/abs/one.pem", "two.pem"]
      client = [["c.pem", "k.pem"], "both.pem"]
      skip_verify = true
      dial_timeout = "1s"
      [host."https://mirror.example:8443".header]
        x-one = "secret"
        x-two = ["a", "b"]
    [host."http://harbor.example/v2/proxy"]
      override_path = true
    [host."plain.example/some/path"]
    """
    mirror, harbor, third, own = parse_hosts(text, "r.example", "/etc/c/r.example")
    assert str(mirror.origin) == "https://mirror.example:8443"
    assert mirror.capabilities == {Capability.PULL, Capability.RESOLVE}
    assert mirror.tls.ca == ("/abs/one.pem", "/etc/c/r.example/two.pem")
    assert mirror.tls.client == (
        ("/etc/c/r.example/c.pem", "/etc/c/r.example/k.pem"),
        ("/etc/c/r.example/both.pem", ""),
    )
    assert mirror.tls.skip_verify
    assert mirror.headers == (("x-one", "secret"), ("x-two", "a"), ("x-two", "b"))
    assert "secret" not in repr(mirror)
    assert (mirror.path, mirror.namespace) == ("/v2", "r.example")
    assert (str(harbor.origin), harbor.path) == ("http://harbor.example", "/v2/proxy")
    assert third.path == "/some/path/v2"
    assert (own.path, own.namespace, own.tls.ca) == ("/v2", "", ("/etc/c/r.example/ca.pem",))
    (hub,) = parse_hosts("", "docker.io", "/x")
    assert (hub.origin.host, hub.namespace) == ("registry-1.docker.io", "")


@pytest.mark.parametrize(
    "text",
    ["x", "host = 1", "server = 1", '[host."ftp://a"]', '[host."https://u:p@a"]',
     'capabilities = ["all"]',      "skip_verify = 1", "ca = 1", "client = [1]", "header = 1",
     '[header]\nx = "a\\r\\nb"', '[header]\nx = "é"', "[host]\na = 1"],
)  # fmt: skip
def test_a_malformed_hosts_file_names_itself(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^/x/hosts\.toml"):
        parse_hosts(text, "r.example", "/x")


def test_folders_of_hosts(tmp_path: Path) -> None:
    assert folder_names("r.example:5000") == (
        "r.example_5000_",
        "r.example:5000",
        "r.example",
        "_default",
    )
    assert folder_names("[::1]") == ("[::1]", "_default")
    find = HostsFolder(tmp_path)
    assert find("r.example") == [default_host("r.example")]
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text('[host."https://all.example"]')
    assert [host.origin.host for host in find("r.example")] == ["all.example", "r.example"]
    folder = tmp_path / "r.example"
    folder.mkdir()
    for name in ("a.crt", "b.cert", "b.key", "other"):
        (folder / name).touch()
    (host,) = find("r.example")
    assert host.tls.ca == (str(folder / "a.crt"),)
    assert host.tls.client == ((str(folder / "b.cert"), str(folder / "b.key")),)
    with pytest.raises(InvalidArgument, match=r"a\.crt has no certificate"):
        trust(host.tls)
    (folder / "hosts.toml").write_text('ca = "a\\u0000.crt"')
    with pytest.raises(InvalidArgument, match=r"a\\x00\.crt has no certificate"):
        trust(find("r.example")[0].tls)


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    ["http://a.example/x", "file:///etc/shadow", "gopher://x", "https://u:p@b.example/", "https://b:0/",
     "https://b:99999/", "https://b.example/\r\nX: y", "https://bü.example/",
     "https://[::1/"],
)  # fmt: skip
def test_r01_redirects_that_are_refused(location: str) -> None:
    with pytest.raises(BadAnswer):
        redirected(HERE, "/v2/a/blobs/x", location)


def test_redirects() -> None:
    assert redirected(HERE, "/v2/a", "../b?c=d#e") == (HERE, "/b?c=d")
    assert redirected(HERE, "/v2/a", "//b.example:1/c") == (Origin("https", "b.example", 1), "/c")
    plain = Origin("http", "a.example", 80)
    assert redirected(plain, "/", "https://a.example") == (HERE, "/")


def test_r04_the_next_page_is_at_the_same_host() -> None:
    assert next_page(HERE, "/v2/x", '</v2/x?last=1>; rel="next"') == "/v2/x?last=1"
    assert next_page(HERE, "/v2/x", "") is None
    with pytest.raises(BadAnswer):
        next_page(HERE, "/v2/x", '<https://b.example/v2/x>; rel="next"')


def test_parts() -> None:
    assert part("bytes 5-9/10", 10) == (5, 10)
    assert part("bytes 5-6/*", 10) == (5, 7)
    for bad in ("", "bytes 5-10/10", "bytes 5-9/11", "bytes 9-5/10", "bytes */10", "bytes 5-9/10x"):
        with pytest.raises(BadAnswer):
            part(bad, 10)
    assert (content_length("0"), content_length(None)) == (0, None)
    for bad in ("-1", "1, 1", "1e3", "9" * 20, "٣"):
        with pytest.raises(BadAnswer):
            content_length(bad)


def test_kinds_of_documents() -> None:
    manifest = "application/vnd.oci.image.manifest.v1+json"
    assert document_type(f"{manifest}; charset=utf-8", None, "x") == manifest
    assert document_type("text/html", None, "x") == ""
    shaped = json.dumps({"schemaVersion": 2, "layers": []}).encode()
    assert document_type("application/json", shaped, "x") == manifest
    assert document_type("", json.dumps({"mediaType": "a/b"}).encode(), "x") == "a/b"
    for kind, data in (
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", None),
        ("text/html", b"<html>"),
        ("application/json", b"{}"),
        ("", json.dumps({"mediaType": "a/" + "b" * 254}).encode()),
    ):
        with pytest.raises(Refused):
            document_type(kind, data, "x")
    assert stated_digest("sha256:" + "a" * 64)
    assert stated_digest("md5:0") is None


def test_r15_what_errors_say_is_short_and_printable() -> None:
    said = json.dumps({"errors": [{"code": "DENIED", "message": "no\x1b[31m" + "x" * 10_000}]}).encode()
    assert explained(said, ["", "Y"]).startswith("DENIED: no\\x1b[31mxxx")
    assert len(explained(said, [])) < 300
    assert explained(said, ["x" * 10_000]) == ""
    for data in (b"", b"<html>", b"[]", b'{"errors": [1]}', b'{"errors": {}}'):
        assert explained(data, []) == ""


def test_waits_double_are_drawn_and_end() -> None:
    patience = Patience(attempts=4, first_wait=1, longest_wait=3, longest_asked=60)
    error = Unavailable("x")
    assert [patience.wait(n, error, 1.0) for n in (1, 2, 3, 4)] == [1, 2, 3, None]
    assert patience.wait(2, error, 0.0) == 1
    assert patience.wait(1, Busy("x", 30), 0.5) == 30
    assert patience.wait(1, Busy("x", 61), 0.5) is None


def test_retry_after() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_retry_after("120", now) == 120
    assert parse_retry_after("Thu, 01 Jan 2026 00:00:10 GMT", now) == 10
    assert parse_retry_after("Wed, 31 Dec 2025 00:00:10 GMT", now) == 0
    assert parse_retry_after("9" * 400, now) == float("9" * 12)
    for nothing in ("", "-1", "soon", "1.5", "Thu, 99 Jan 2026 00:00:10 GMT"):
        assert parse_retry_after(nothing, now) is None


def test_urls_have_no_user() -> None:
    assert parse_url("https://a.example:8443/x?y", "u") == (
        Origin("https", "a.example", 8443),
        "/x",
        "y",
    )
    with pytest.raises(Refused):
        parse_url("https://u:secret@a.example/", "u")
