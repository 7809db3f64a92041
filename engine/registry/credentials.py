"""Who we are to a registry, and what docker's `config.json` says about that.

Pure. A secret is in no repr, so that it comes into no log.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from engine import limits
from engine.errors import Refused
from engine.oci.documents import decode_json

__all__ = [
    "Credential",
    "Credentials",
    "DockerConfig",
    "mark",
    "nobody",
    "parse_answer",
    "parse_docker_config",
]

_HUB = "index.docker.io"
_HUB_URL = f"https://{_HUB}/v1/"
_HUB_HOSTS = frozenset({"docker.io", _HUB, "registry-1.docker.io"})
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_IDENTITY_USER = "<token>"  # how a program says that its secret is an identity token


@dataclass(frozen=True, slots=True)
class Credential:
    """A user with a password, or an identity token that gets tokens in place of one."""

    user: str
    secret: str = field(repr=False)
    is_identity: bool = False


Credentials = Callable[[str], Credential | None]
"""Return the credential for a host, `name[:port]`; may block."""


def mark(credential: Credential | None, about: str) -> str:
    """Return what stands for a credential in a record `about` something, `anyone` where none was used.

    It tells who has the same credential, not what that is, but to those who can guess it.
    """
    if credential is None:
        return "anyone"
    told = msgspec.json.encode([about, credential.user, credential.secret, credential.is_identity])
    return hashlib.sha256(told).hexdigest()


def nobody(_host: str) -> None:
    """Have no credential, for any host."""


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """What docker's `config.json` says of credentials, by host."""

    stored: Mapping[str, Credential] = field(default_factory=dict, repr=False)
    programs: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    """The program for all other hosts."""

    def for_host(self, host: str) -> tuple[str, str]:
        """Return the program to ask about a host, "" for none, and what to call the host there."""
        name = _hub(host)
        return self.programs.get(name, self.program), _HUB_URL if name == _HUB else host

    def credential(self, host: str) -> Credential | None:
        """Return the credential that the file itself has for a host."""
        return self.stored.get(_hub(host))


class _Auth(msgspec.Struct, frozen=True, rename="lower"):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(default="", name="identitytoken")


class _File(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Auth] | None = None  # Go takes null as empty
    cred_helpers: dict[str, str] | None = None
    creds_store: str = ""


def parse_docker_config(data: bytes, what: str) -> DockerConfig:
    """Return what a `config.json` says; Refused, without a word of it, if it is malformed."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, RecursionError):
        raise Refused(f"{what} is not a config.json of docker's; mend it or log in again") from None
    stored = {}
    for host, auth in (file.auths or {}).items():
        if found := _stored(auth, what):
            stored[_hub(_host_of(host))] = found
    helpers = file.cred_helpers or {}
    programs = {_hub(_host_of(host)): _program(name, what) for host, name in helpers.items()}
    return DockerConfig(stored, programs, _program(file.creds_store, what) if file.creds_store else "")


def parse_answer(data: bytes, what: str) -> Credential:
    """Return what a credential program answered; Refused, without a word of it, if it is malformed."""
    if len(data) > limits.CREDENTIALS_FILE:
        raise Refused(f"{what} answered over {limits.CREDENTIALS_FILE} bytes")
    try:
        answer = decode_json(data, what)
    except Refused:
        answer = None
    if not isinstance(answer, dict):
        raise Refused(f"{what} did not answer with a JSON object")
    user, secret = answer.get("Username", ""), answer.get("Secret", "")
    if not isinstance(user, str) or not isinstance(secret, str):
        raise Refused(f"{what} did not answer with a user name and a secret")
    is_identity = user == _IDENTITY_USER
    return _checked(Credential("" if is_identity else user, secret, is_identity), what)


def _stored(auth: _Auth, what: str) -> Credential | None:
    user, secret = auth.username, auth.password
    if auth.auth:
        try:
            user, _, secret = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise Refused(f"{what} has an `auth` that is not base64; log in again") from None
    if auth.identity_token:
        return _checked(Credential(user, auth.identity_token, is_identity=True), what)
    secret = secret.strip("\0")  # as in docker
    return _checked(Credential(user, secret), what) if user or secret else None


def _checked(credential: Credential, what: str) -> Credential:
    """Refuse what could not be sent, or would be read in another way than it was meant."""
    if not (credential.user + credential.secret).isprintable() or ":" in credential.user:
        raise Refused(f"{what} has a user name or a secret with characters that none can have")
    return credential


def _program(name: str, what: str) -> str:
    if not _PROGRAM.match(name):
        raise Refused(f"{what} names a credential program by more than letters and digits")
    return f"docker-credential-{name}"


def _host_of(key: str) -> str:
    """Return the host of a key, which older versions of docker wrote as a URL."""
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]


def _hub(host: str) -> str:
    return _HUB if host in _HUB_HOSTS else host
