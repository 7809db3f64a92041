"""Debian's docker-registry for tests: plain, with TLS, passwords, tokens, or in front of another.

Sync.
"""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.compat.images import run
from tests.conftest import peer

__all__ = ["PASSWORD", "USER", "Certified", "Server", "Settings", "certificates", "push", "serving"]

USER, PASSWORD = "user", "s3cr3t"
_BCRYPT = "$2b$05$abcdefghijklmnopqrstuu9Avu/WgbsK7g7xfCY1X3pdjsTgxqQLS"  # of PASSWORD
_ASKED = re.compile(r'"([A-Z]+) (\S+) HTTP/1\.\d" (\d+) (\d+)')
_START_S = 30

Settings = Mapping[str, object]
"""Parts of docker-registry's configuration."""


@dataclass(frozen=True)
class Certified:
    """A CA, and what it says of 127.0.0.1 and of a client: PEM files of one folder."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def signed(self, name: str, *options: object, days: int = 2) -> Path:
        """Have the CA say for some days that a new key, beside what is returned, is that of `name`."""
        openssl, certificate = peer("openssl"), self.folder / f"{name}.pem"
        request = ("-out", self.folder / f"{name}.csr", "-subj", f"/CN={name}", *options)
        run(openssl, "req", *_NEW, "-keyout", certificate.with_suffix(".key"), *request)
        signing = ("-CA", self.ca, "-CAkey", self.folder / "ca.key", "-CAcreateserial", "-days", days)
        given = ("-in", self.folder / f"{name}.csr", "-out", certificate, "-copy_extensions", "copy")
        run(openssl, "x509", "-req", *given, *signing)
        return certificate

    @property
    def tls(self) -> Settings:
        """How a registry is to prove that it is this host."""
        return {"certificate": str(self.folder / "host.pem"), "key": str(self.folder / "host.key")}


_NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def certificates(folder: Path) -> Certified:
    """Make a CA, and what it says of 127.0.0.1 (`host`) and of a client (`client`)."""
    made = Certified(folder)
    ca = ("-keyout", folder / "ca.key", "-out", made.ca, "-subj", "/CN=test CA", "-days", 2)
    run(peer("openssl"), "req", "-x509", *_NEW, *ca)
    made.signed("host", "-addext", "subjectAltName=IP:127.0.0.1")
    made.signed("client", "-addext", "extendedKeyUsage=clientAuth")
    return made


@dataclass(frozen=True)
class Server:
    """A registry that runs."""

    name: str
    folder: Path
    certified: Certified | None = None

    def asked(self) -> list[tuple[str, str, int, int]]:
        """Return method, target, status and bytes of each answer, in the order that they ended."""
        text = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        return [(one[1], one[2], int(one[3]), int(one[4])) for one in _ASKED.finditer(text)]


def passwords(folder: Path) -> Settings:
    """Let in who knows USER and PASSWORD."""
    (folder / "htpasswd").write_text(f"{USER}:{_BCRYPT}\n")
    return {"auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}}


@contextmanager
def serving(
    folder: Path, *settings: Settings, certified: Certified | None = None, clients: bool = False
) -> Iterator[Server]:
    """Run a registry, with TLS if `certified`, to certified `clients` alone if so told."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    http: dict[str, object] = {"addr": f"127.0.0.1:{port}"}
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "http": http,
    }
    for more in settings:
        config |= more
    if certified:
        http["tls"] = {**certified.tls, **({"clientcas": [str(certified.ca)]} if clients else {})}
    file = folder / "config.yml"
    file.write_text(json.dumps(config))  # which YAML is a superset of
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([peer("docker-registry"), "serve", file], stdout=log, stderr=log)
    try:
        _await(port, server)
        yield Server(f"127.0.0.1:{port}", folder, certified)
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


def push(source: Path, server: Server, name: str, *options: object, user: str = "") -> str:
    """Push what an OCI layout calls `latest` with skopeo; return the digest that it has there."""
    told = source.with_name("pushed")
    trust: Sequence[object] = ("--dest-tls-verify=false",)
    if server.certified:
        trust = ("--dest-cert-dir", _trusting(server.certified))
    credentials = ("--dest-creds", user) if user else ()
    skopeo = (peer("skopeo"), "--insecure-policy", "copy", "--digestfile", told)
    target = f"docker://{server.name}/{name}"
    run(*skopeo, *trust, *credentials, *options, f"oci:{source}:latest", target)
    return told.read_text().strip()


def _trusting(certified: Certified) -> Path:
    """Return a folder of docker's form: whom to trust, and who we are."""
    found = certified.folder / "certs"
    if not found.exists():
        found.mkdir()
        for file, name in (("ca.pem", "ca.crt"), ("client.pem", "a.cert"), ("client.key", "a.key")):
            (found / name).write_bytes((certified.folder / file).read_bytes())
    return found
