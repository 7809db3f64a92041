"""Which hosts serve a registry, and how each is reached: containerd's `hosts.toml`.

Pure. Keys and defaults are containerd's (docs/hosts.md there), so that one folder serves both; but that
plain HTTP is spoken only where it is configured or the host is this one, never after HTTPS failed.
"""

import ipaddress
import posixpath
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from engine.errors import InvalidArgument, Refused, printable

__all__ = [
    "Capability",
    "Host",
    "Origin",
    "Tls",
    "default_host",
    "folder_names",
    "is_loopback",
    "parse_hosts",
    "parse_url",
]

_PORTS = {"http": 80, "https": 443}
_HUB, _HUB_HOST = "docker.io", "registry-1.docker.io"


class Capability(StrEnum):
    """What a host may be asked for."""

    PULL = "pull"
    """Content by its digest."""
    RESOLVE = "resolve"
    """What a tag means."""
    PUSH = "push"
    REFERRERS = "referrers"


_ALL = frozenset(Capability)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go; credentials for one origin are never sent to another."""

    scheme: str
    host: str
    port: int

    @property
    def name(self) -> str:
        """The host as people write it: with its port, unless that is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}"


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom a host must prove to be, and we to it; paths of PEM files."""

    ca: tuple[str, ...] = ()
    """Beside those that the system trusts."""
    client: tuple[tuple[str, str], ...] = ()
    """Certificates and their keys; "" for a key that is in the file of its certificate."""
    skip_verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host that serves a registry's images."""

    origin: Origin
    path: str = "/v2"
    namespace: str = ""
    """The registry that a mirror of several is asked about."""
    capabilities: frozenset[Capability] = _ALL
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls = field(default_factory=Tls)


def parse_url(text: str, what: str) -> tuple[Origin, str, str]:
    """Return the origin, path and query of an absolute URL; Refused for any that is odd."""
    odd = Refused(f"{what} is not an http or https URL without user and password")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise odd
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise odd from None
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or port == 0:
        raise odd
    origin = Origin(parts.scheme, parts.hostname, port or _PORTS[parts.scheme])
    return origin, parts.path, parts.query


def is_loopback(host: str) -> bool:
    """Say whether a host is this one, by its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def default_host(domain: str, *, plain_http: bool = False) -> Host:
    """Return the host that a registry is served by where nothing is configured."""
    host = _HUB_HOST if domain == _HUB else domain
    origin = parse_url(f"https://{host}", f"{printable(domain)!r}")[0]
    if plain_http or (is_loopback(origin.host) and not host.endswith(":443")):
        origin = parse_url(f"http://{host}", f"{printable(domain)!r}")[0]
    return Host(origin=origin)


def folder_names(domain: str) -> tuple[str, ...]:
    """Return the names of folders that may tell about a registry, the first found counts."""
    host, colon, port = domain.rpartition(":")
    named = (f"{host}_{port}_", domain, host) if colon and not host.endswith(":") else (domain,)
    return (*named, "_default")


def parse_hosts(text: str, domain: str, folder: str, *, plain_http: bool = False) -> list[Host]:
    """Return the hosts of a registry in the order to ask them; `folder` is that of the file.

    Raises InvalidArgument for a file that is malformed.
    """
    what = f"{folder}/hosts.toml"
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{what}: {printable(str(error))}") from None
    tables = document.get("host", {})
    if not isinstance(tables, dict):
        raise InvalidArgument(f'{what}: `host` is a table: [host."https://mirror.example"]')
    reader = _Reader(what, folder, domain)
    hosts = [reader.host(url, table) for url, table in tables.items()]
    server = document.get("server")
    if server is None:
        upstream = default_host(domain, plain_http=plain_http)
        server = str(upstream.origin)
    return [*hosts, reader.host(server, document)]


@dataclass(frozen=True, slots=True)
class _Reader:
    what: str
    folder: str
    domain: str

    def host(self, url: object, table: object) -> Host:
        if not isinstance(url, str) or not isinstance(table, dict):
            raise InvalidArgument(f'{self.what}: a host is a table: [host."https://mirror.example"]')
        try:
            origin, path, _ = parse_url(url if "://" in url else f"https://{url}", f"{printable(url)!r}")
        except Refused as error:
            raise InvalidArgument(f"{self.what}: {error}") from None
        path = path.rstrip("/")
        if not self._flag(table, "override_path") and not path.endswith("/v2"):
            path += "/v2"
        upstream = default_host(self.domain).origin
        is_upstream = (origin.host, origin.port) == (upstream.host, upstream.port)
        return Host(
            origin=origin,
            path=path,
            namespace="" if is_upstream or origin.name == self.domain else self.domain,
            capabilities=self._capabilities(table),
            headers=self._headers(table),
            tls=Tls(
                tuple(self._place(name) for name in self._texts(table, "ca")),
                self._client(table),
                self._flag(table, "skip_verify"),
            ),
        )

    def _capabilities(self, table: Mapping[str, object]) -> frozenset[Capability]:
        if "capabilities" not in table:
            return _ALL
        names = self._texts(table, "capabilities")
        try:
            return frozenset(map(Capability, names))
        except ValueError:
            known = ", ".join(Capability)
            raise InvalidArgument(f"{self.what}: `capabilities` are some of {known}") from None

    def _headers(self, table: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
        headers = table.get("header", {})
        if not isinstance(headers, dict):
            raise InvalidArgument(f"{self.what}: `header` is a table of names and texts")
        found = [(name, value) for name in headers for value in self._texts(headers, name)]
        both = [f"{name}{value}" for name, value in found]
        if not all(text.isascii() and text.isprintable() for text in both):
            raise InvalidArgument(f"{self.what}: `header` has characters that no header can have")
        return tuple(found)

    def _client(self, table: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
        value = table.get("client", [])
        pairs = value if isinstance(value, list) else [value]
        found: list[tuple[str, str]] = []
        for pair in pairs:
            match pair:
                case str(certificate) | [str(certificate)]:
                    found.append((self._place(certificate), ""))
                case [str(certificate), str(key)]:
                    found.append((self._place(certificate), self._place(key)))
                case _:
                    raise InvalidArgument(f'{self.what}: `client` is a list of ["cert.pem", "key.pem"]')
        return tuple(found)

    def _texts(self, table: Mapping[str, object], key: str) -> Sequence[str]:
        value = table.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidArgument(f"{self.what}: `{printable(key)}` is a text or a list of texts")
        return texts

    def _flag(self, table: Mapping[str, object], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise InvalidArgument(f"{self.what}: `{key}` is true or false")
        return value

    def _place(self, name: str) -> str:
        return posixpath.join(self.folder, name)
