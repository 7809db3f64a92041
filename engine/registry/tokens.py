"""Who we are to one host: Basic, or tokens of the server that the host names, each got once and shared.

Async. Credentials go to the configured host and to the token server that its challenge names, if that
is as safe; to nobody else. What a challenge asks for beyond our own needs is never asked for.
"""

import base64
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

import trio

from engine import limits
from engine.errors import PermissionDenied, Refused, Unavailable, printable
from engine.oci.documents import decode_json
from engine.registry.challenge import Challenge
from engine.registry.connections import Answer, Connections, Peer
from engine.registry.credentials import Credential, Credentials
from engine.registry.hosts import parse_url
from engine.registry.protocol import BadAnswer, explained
from engine.registry.retrying import PASSING, Busy

__all__ = ["Authority"]

_CLIENT = "lamina"
_NO_POST = frozenset({400, 401, 404, 405})  # where containerd asks again by GET, too
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    until: float


class Authority:
    """What one host takes for authorisation."""

    def __init__(self, peer: Peer, connections: Connections, credentials: Credentials) -> None:
        self._peer = peer
        self._connections = connections
        self._credentials = credentials
        self._challenge: Challenge | None = None
        self._tokens: dict[str, _Token] = {}
        self._renewing: dict[str, trio.Lock] = {}
        self.credential: Credential | None = None
        """Whose access it is, once the host has asked; None where it lets anyone in."""

    async def header(self, scope: str) -> str | None:
        """Return what to send with a request, as far as the host has said what it wants."""
        if self._challenge is None:
            return None
        return await self._header(self._challenge, scope, refused=None)

    async def answered(self, challenges: list[Challenge], scope: str, sent: str | None) -> str:
        """Return what to send after a 401, where `sent` was not enough. Raises PermissionDenied."""
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        challenge = by_scheme.get("bearer") or by_scheme.get("basic")
        if challenge is None:
            raise PermissionDenied(f"{self._name} wants credentials, but not as Basic or Bearer")
        self._challenge = challenge
        return await self._header(challenge, scope, refused=sent)

    def secrets(self) -> Iterator[str]:
        """Yield what nobody is to be told, should the host say it."""
        yield from (token.header.partition(" ")[2] for token in self._tokens.values())
        if self.credential:
            yield self.credential.secret
            yield _basic(self.credential).partition(" ")[2]

    @property
    def _name(self) -> str:
        return self._peer.origin.name

    async def _header(self, challenge: Challenge, scope: str, refused: str | None) -> str:
        if challenge.scheme == "basic":
            credential = await self._credential()
            header = _basic(credential) if credential and not credential.is_identity else None
            if header is None:
                raise PermissionDenied(f"{self._name} wants a user and a password; log in to it first")
            if header == refused:
                raise PermissionDenied(
                    f"{self._name} does not take this user and password; log in again"
                )
            return header
        async with self._renewing.setdefault(scope, trio.Lock()):
            token = self._tokens.get(scope)
            now = trio.current_time()
            if token is None or token.until <= now or token.header == refused:
                self._tokens.pop(scope, None)
                self._tokens[scope] = token = await self._new(challenge, scope, now)
            return token.header

    async def _credential(self) -> Credential | None:
        self.credential = await trio.to_thread.run_sync(self._credentials, self._name)
        return self.credential

    async def _new(self, challenge: Challenge, scope: str, now: float) -> _Token:
        realm = challenge.parameters.get("realm", "")
        try:
            origin, path, query = parse_url(realm, "the token server that it names")
        except Refused as error:
            raise BadAnswer(str(error)) from None
        if origin.scheme != "https" and self._peer.origin.scheme == "https":
            raise BadAnswer(f"it names a token server without TLS, {printable(origin.name)}")
        peer = self._peer.named(origin, with_secrets=True)
        if peer.named_by:
            _log.info("%s has tokens given out by %s", self._name, origin.name)
        asked = {"service": challenge.parameters.get("service", ""), "scope": scope}
        asked = {key: value for key, value in asked.items() if value}  # scopes with spaces between
        credential = await self._credential()
        url = f"{origin}{path or '/'}"
        data = None
        if credential:
            data = await self._posted(peer, f"{url}{'?' if query else ''}{query}", asked, credential)
        if data is None:
            data = await self._got(peer, url, query, asked, credential)
        return self._parsed(data, origin.name, now)

    async def _posted(
        self, peer: Peer, url: str, asked: Mapping[str, str], credential: Credential
    ) -> bytes | None:
        """Ask in OAuth2's form; None where the server does not know that."""
        form = {**asked, "client_id": _CLIENT}
        if credential.is_identity:
            form |= {"grant_type": "refresh_token", "refresh_token": credential.secret}
        else:
            form |= {"grant_type": "password", "username": credential.user}
            form |= {"password": credential.secret}
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept-Encoding": "identity"}
        content = urlencode(form).encode()
        async with self._connections.exchange(peer, "POST", url, headers, content) as answer:
            if answer.status in _NO_POST and not credential.is_identity:
                return None
            return await self._body(answer)

    async def _got(
        self,
        peer: Peer,
        url: str,
        query: str,
        asked: Mapping[str, str],
        credential: Credential | None,
    ) -> bytes:
        pairs = [(key, one) for key, text in asked.items() for one in _values(key, text)]
        query = "&".join(filter(None, (query, urlencode(pairs))))
        headers = {"Accept-Encoding": "identity"}
        if credential:
            headers["Authorization"] = _basic(credential)
        async with self._connections.exchange(peer, "GET", f"{url}?{query}", headers) as answer:
            return await self._body(answer)

    async def _body(self, answer: Answer) -> bytes:
        server = answer.peer.origin.name
        if answer.status == 200:
            return await answer.whole(limits.TOKEN, f"the token of {server}")
        if answer.status in PASSING:
            raise Busy(f"{server} gives out no token now: it answered {answer.status}")
        if answer.status in {401, 403}:
            said = explained(await answer.beginning(limits.ERROR_BODY), self.secrets())
            more = f" ({said})" if said else ""
            raise PermissionDenied(f"{server} gives out no token for {self._name}{more}; log in to it")
        # A redirect too: the password would go with it.
        raise Unavailable(f"{server} gives out no token for {self._name}: it answered {answer.status}")

    def _parsed(self, data: bytes, server: str, now: float) -> _Token:
        try:
            value = decode_json(data, f"the token of {server}")
        except Refused as error:
            raise BadAnswer(str(error)) from None
        members = value if isinstance(value, dict) else {}
        token = members.get("access_token") or members.get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise BadAnswer(f"{server} answered without a token")
        life = members.get("expires_in")
        seconds = life if isinstance(life, int | float) else 0
        life = min(max(seconds, limits.TOKEN_LIFE_S), limits.TOKEN_LIFE_MOST_S)
        return _Token(f"Bearer {token}", now + life * 0.9)


def _values(key: str, text: str) -> list[str]:
    """Return what a query says of a key: several scopes one by one, as docker's form has it."""
    return text.split() if key == "scope" else [text]


def _basic(credential: Credential) -> str:
    pair = f"{credential.user}:{credential.secret}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"
