"""Connections to hosts: one pool for each, with its own trust; headers in time, bodies that get on.

Async. Nothing is taken from the environment, nothing is followed or answered here. Where others than the
configuration name a host, it may not be one that only this machine's surroundings can reach.
"""

import logging
import math
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpcore
import trio

from engine import limits
from engine.errors import EngineError, PermissionDenied, Unavailable, printable
from engine.registry.addresses import Policy, is_open, is_open_with_secrets, parse_address
from engine.registry.hosts import Origin, Tls, is_loopback
from engine.registry.hosts_folder import trust
from engine.registry.network import Names, direct, parse_proxy, through
from engine.registry.protocol import BadAnswer
from engine.registry.retrying import Patience

__all__ = ["Answer", "Connections", "Peer"]

_DRAIN_S = 1.0
_BROKEN = (
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.ProtocolError,
    httpcore.ProxyError,
)
_PIECE = limits.PROGRESS_BYTES  # of what is sent, at once and in the time for so many

# Bytes of one read: at 64 KiB, its own, receiving takes twice the time on a processor.
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = 256 * 1024

for _name in ("httpcore.http11", "httpcore.connection", "httpcore.proxy"):
    # Else debugging another part of a program logs headers, and with them signed URLs.
    logging.getLogger(_name).setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to talk to, and how; a host whose answer named it is `named_by`, not the configuration."""

    origin: Origin
    tls: Tls = field(default_factory=Tls)
    named_by: str = ""

    def named(self, origin: Origin, *, with_secrets: bool = False) -> "Peer":
        """Return a host that this one names: another trusts whom this one does, but never blindly.

        Raises BadAnswer for an address that a public host has no business with, and for private ones
        too where secrets are to go.
        """
        if origin == self.origin:
            return self
        is_same = origin.host == self.origin.host
        both_here = is_loopback(origin.host) and is_loopback(self.origin.host)
        if not (is_same or both_here or _is_open(origin.host, with_secrets=with_secrets)):
            raise BadAnswer(f"it leads to {printable(origin.name)}, where nobody outside may lead")
        return Peer(
            origin, self.tls if is_same else Tls(self.tls.ca), "" if is_same else self.origin.host
        )


class Connections:
    """The pools of one client."""

    def __init__(
        self, patience: Patience, proxy: str | None = None, may_lead_to: Policy = is_open
    ) -> None:
        """With a `proxy` it is that which resolves names. InvalidArgument for what is none."""
        self._patience = patience
        self._names = Names(may_lead_to)
        self._proxy = parse_proxy(proxy) if proxy else None
        self._pools: dict[Peer, _Shared] = {}  # the one that was asked last is the last
        self._trusts: dict[Tls, ssl.SSLContext] = {}
        self._making = trio.Lock()

    async def aclose(self) -> None:
        """Close all connections."""
        pools = [*self._pools.values()]
        self._pools.clear()
        for shared in pools:
            await shared.pool.aclose()

    @asynccontextmanager
    async def exchange(
        self,
        peer: Peer,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | AsyncIterable[bytes] | None = None,
        *,
        slow: float = 0,
    ) -> AsyncIterator["Answer"]:
        """Send a request and give its answer for the length of the block.

        It may take `slow` seconds longer than others. Raises Unavailable where none comes, Refused where
        the host may not be asked.
        """
        async with self._pool(peer) as pool:
            response = await self._send(pool, peer, method, url, headers, content, slow)
            answer = Answer(response, peer, self._patience)
            try:
                yield answer
            finally:
                with trio.CancelScope(shield=True):
                    await answer.aclose()

    async def _send(
        self,
        pool: httpcore.AsyncConnectionPool,
        peer: Peer,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | AsyncIterable[bytes] | None,
        slow: float,
    ) -> httpcore.Response:
        patience = self._patience
        request = _request(peer, method, url, headers, content)
        request.extensions["timeout"] = {"connect": patience.connect}
        try:
            with trio.fail_after(patience.connect + patience.answer + slow) as scope:
                request.stream = _Paced(content or b"", scope, patience, slow)
                return await pool.handle_async_request(request)
        except trio.TooSlowError:
            raise Unavailable(f"{peer.origin.name} does not answer") from None
        except _BROKEN as error:
            raise _mapped(peer.origin.name, error) from None

    @asynccontextmanager
    async def _pool(self, peer: Peer) -> AsyncIterator[httpcore.AsyncConnectionPool]:
        """Give the connections to a host; those of hosts asked long ago are closed for it."""
        async with self._making:
            shared = self._pools.pop(peer, None) or _Shared(await self._made(peer))
            self._pools[peer] = shared
            shared.users += 1
            try:
                await self._close_old()
            except BaseException:
                shared.users -= 1
                raise
        try:
            yield shared.pool
        finally:
            shared.users -= 1

    async def _made(self, peer: Peer) -> httpcore.AsyncConnectionPool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # that trusts nobody
        if peer.origin.scheme == "https":
            if peer.tls not in self._trusts:  # 20 ms and 800 KB, and others name hosts
                self._trusts[peer.tls] = await trio.to_thread.run_sync(trust, peer.tls)
            context = self._trusts[peer.tls]
        if self._proxy:
            return through(self._proxy, context)
        return direct(self._names, peer.named_by, context)

    async def _close_old(self) -> None:
        idle = [peer for peer, shared in self._pools.items() if not shared.users]
        for peer in idle[: max(0, len(self._pools) - limits.HOSTS)]:
            with trio.CancelScope(deadline=trio.current_time() + _DRAIN_S, shield=True):
                await self._pools.pop(peer).pool.aclose()


@dataclass(slots=True, eq=False)
class _Shared:
    """The connections to one host, and how many use them now."""

    pool: httpcore.AsyncConnectionPool
    users: int = 0


class Answer:
    """The header of an answer, and its body as it comes, as it was sent: nothing is decoded."""

    def __init__(self, response: httpcore.Response, peer: Peer, patience: Patience) -> None:
        self.peer = peer
        self.status = response.status
        self.data = b""
        """The body, for who asked for it whole."""
        self._response = response
        self._patience = patience
        self._chunks = aiter(response.stream) if isinstance(response.stream, AsyncIterable) else None
        self._begin_window()

    def _begin_window(self) -> None:
        self._left = self._patience.progress
        self._seen = 0

    def header(self, name: str) -> str | None:
        """Return a header, None if it is not there."""
        return ", ".join(self.headers(name)) if self.headers(name) else None

    def headers(self, name: str) -> list[str]:
        """Return a header as often as it is there."""
        wanted = name.lower().encode()
        return [
            value.decode("latin-1") for key, value in self._response.headers if key.lower() == wanted
        ]

    async def read(self) -> bytes:
        """Return some more bytes, none at the end. Unavailable if it breaks off or hardly gets on."""
        if self._chunks is None:
            return b""
        began = trio.current_time()
        try:
            with trio.fail_after(max(0, self._left)):
                chunk = await anext(self._chunks, b"")
        except trio.TooSlowError:
            self._chunks = None
            raise Unavailable(
                f"{self.peer.origin.name} sends less than {self._patience.progress_bytes} bytes "
                f"in {self._patience.progress:.3g} s"
            ) from None
        except _BROKEN as error:
            self._chunks = None
            raise _mapped(self.peer.origin.name, error) from None
        # Whoever takes the bytes may take his time: what counts is how long they are waited for.
        self._left -= trio.current_time() - began
        self._seen += len(chunk)
        if self._seen >= self._patience.progress_bytes:
            self._begin_window()
        if not chunk:
            self._chunks = None
        return chunk

    async def whole(self, limit: int, what: str) -> bytes:
        """Return a small body whole. BadAnswer over `limit` bytes."""
        found = await self.beginning(limit + 1)
        if len(found) > limit:
            raise BadAnswer(f"{what} is over {limit} bytes")
        return found

    async def beginning(self, limit: int) -> bytes:
        """Return the first bytes of a body, so many at most."""
        found = bytearray()
        while len(found) < limit and (chunk := await self.read()):
            found += chunk
        return bytes(found[:limit])

    async def aclose(self) -> None:
        """Let go of the connection, for the next request if little is left to read."""
        if self._chunks is not None:
            # To the end or to an error: else the generators below are left to the garbage collector.
            wait = min(_DRAIN_S, self._patience.progress)
            seen = 0
            with trio.move_on_after(wait) as scope:
                try:
                    while chunk := await anext(self._chunks, b""):
                        seen += len(chunk)
                        if seen > limits.ERROR_BODY:
                            scope.cancel()
                except _BROKEN:
                    pass
            self._chunks = None
        await self._response.aclose()


def _request(
    peer: Peer,
    method: str,
    url: str,
    headers: Mapping[str, str],
    content: bytes | AsyncIterable[bytes] | None,
) -> httpcore.Request:
    """Return a request without its body. Of what has no known length `headers` say it."""
    origin = peer.origin
    target = url.removeprefix(str(origin)).partition("#")[0]
    told = {"Host": origin.name, **headers}
    if isinstance(content, bytes) or (content is None and method not in {"GET", "HEAD"}):
        told["Content-Length"] = str(len(content or b""))
    if len(target) > limits.TARGET:
        raise BadAnswer(f"it leads to what is no URL, at {printable(origin.name)}")
    place = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=target)
    return httpcore.Request(method, place, headers=[*told.items()], extensions={})


class _Paced:
    """What is sent: the host has a time for each piece, and one to answer after the last.

    No generator: one that a connection broke off under is left unfinished.
    """

    def __init__(
        self,
        content: bytes | AsyncIterable[bytes],
        scope: trio.CancelScope,
        patience: Patience,
        slow: float,
    ) -> None:
        whole, more = (content, None) if isinstance(content, bytes) else (b"", aiter(content))
        self._left = memoryview(whole)
        self._more = more
        self._scope = scope
        self._piece_s = patience.progress
        self._answer_s = patience.answer + slow

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left and self._more:
            self._scope.deadline = math.inf  # it is not the host that is waited for
            self._left = memoryview(await anext(self._more, b""))
        if not self._left:
            self._scope.deadline = trio.current_time() + self._answer_s
            raise StopAsyncIteration
        self._scope.deadline = trio.current_time() + self._piece_s
        piece, self._left = self._left[:_PIECE], self._left[_PIECE:]
        return bytes(piece)


def _is_open(host: str, *, with_secrets: bool) -> bool:
    """Say whether a host may be named by others, as far as that can be told from its name."""
    address = parse_address(host)
    if address is None:
        return not is_loopback(host)
    return is_open_with_secrets(address) if with_secrets else is_open(address)


def _mapped(host: str, error: Exception) -> EngineError:
    """Return the error of ours that stands for one of httpcore, which may quote a URL."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and (mapped := _of_tls(host, cause)):
            return mapped
        cause = cause.__cause__ or cause.__context__
    match error:
        case httpcore.ProxyError():
            return Unavailable(f"{host}: the proxy does not let it be reached: {printable(str(error))}")
        case httpcore.ConnectTimeout() | httpcore.ConnectError():
            return Unavailable(f"{host} cannot be reached: {printable(str(error)) or 'no connection'}")
        case httpcore.RemoteProtocolError():
            return Unavailable(f"{host} broke off, or does not speak HTTP: {printable(str(error))}")
        case _:
            return Unavailable(f"{host} broke off: {type(error).__name__}")


def _of_tls(host: str, error: ssl.SSLError) -> EngineError | None:
    """Return what OpenSSL means, if that says more than that there is no connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return PermissionDenied(
            f"{host}: its certificate is not to be trusted: {printable(error.verify_message)}; "
            "name its CA in hosts.toml (`ca`)"
        )
    # An alert 116 (RFC 8446), or what servers of TLS 1.2 say instead.
    if re.search("CERTIFICATE_REQUIRED|BAD_CERTIFICATE", str(error)):
        return PermissionDenied(
            f"{host} wants a certificate of ours, or another; name it in hosts.toml (`client`)"
        )
    if "WRONG_VERSION_NUMBER" in str(error):
        return Unavailable(f"{host} does not speak HTTPS; add --plain-http if HTTP is meant")
    return None
