"""Where names lead: resolved once, pinned for a while, and held against a policy before a byte is sent.

Async. A name that leads elsewhere with every question cannot lead past the policy, nor from the host
that gave out a token to another. Where an address does not answer the next one is tried beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore
import trio

from engine import limits
from engine.errors import InvalidArgument, printable
from engine.registry.addresses import Policy, parse_address
from engine.registry.protocol import BadAnswer

__all__ = ["Names", "direct", "parse_proxy", "through"]

_IDLE, _IDLE_S = 10, 30.0  # connections, and for how long: as in containerd
_PROXY_PORTS = {"http": 80, "https": 443}
_NEXT_S = 0.25  # RFC 8305, "connection attempt delay"


@dataclass(frozen=True, slots=True)
class _Pin:
    addresses: tuple[str, ...]
    until: float


class Names:
    """The addresses of names, as they were when first asked for."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._pins: dict[str, _Pin] = {}
        self._asking: dict[str, trio.Lock] = {}

    async def addresses(self, host: str, named_by: str) -> tuple[str, ...]:
        """Return the addresses of a host; those that the host that named it may lead to.

        Raises OSError where there are none, BadAnswer if it may lead to none of them.
        """
        found = await self._resolved(host)
        if not named_by:
            return found
        # Of what is on this machine others there may be named.
        is_here = all(map(_is_here, await self._resolved(named_by)))
        allowed = tuple(one for one in found if self._allows(one) or (is_here and _is_here(one)))
        if not allowed:
            raise BadAnswer(
                f"it leads to {printable(host)} ({', '.join(found)}), where nobody outside may lead"
            )
        return allowed

    def _allows(self, address: str) -> bool:
        parsed = parse_address(address)
        return parsed is not None and self._policy(parsed)

    async def _resolved(self, host: str) -> tuple[str, ...]:
        # One question at a time: two who ask at once are told the same.
        async with self._asking.setdefault(host, trio.Lock()):
            return (await self._pinned(host)).addresses

    async def _pinned(self, host: str) -> _Pin:
        pin = self._pins.get(host)
        if pin is None or pin.until <= trio.current_time():
            found = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(_text(where) for *_, where in found))
            pin = self._pins[host] = _Pin(addresses, trio.current_time() + limits.PINNED_S)
        return pin

    def forget(self, host: str) -> None:
        """Ask anew the next time: nobody answers there."""
        self._pins.pop(host, None)


def _text(where: tuple[Any, ...]) -> str:
    scope = f"%{where[3]}" if len(where) == 4 and where[3] else ""
    return f"{where[0]}{scope}"


def _is_here(address: str) -> bool:
    parsed = parse_address(address)
    return parsed is not None and parsed.is_loopback


class _Backend(httpcore.TrioBackend):
    """Connects where names lead to that `named_by` named, or the configuration if that is ""."""

    def __init__(self, names: Names, named_by: str) -> None:
        self._names = names
        self._named_by = named_by

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            with trio.fail_after(timeout or limits.CONNECT_S):
                addresses = await self._names.addresses(host, self._named_by)
                return await self._first(addresses, port)
        except trio.TooSlowError:
            self._names.forget(host)
            raise httpcore.ConnectTimeout("nobody answers") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from None
        except httpcore.ConnectError:
            self._names.forget(host)
            raise

    async def _first(self, addresses: Iterable[str], port: int) -> httpcore.AsyncNetworkStream:
        """Return the connection that is there first; each next one is begun if one fails or waits."""
        there: list[httpcore.AsyncNetworkStream] = []
        failed: list[httpcore.ConnectError] = []

        async def connect(address: str, has_failed: trio.Event) -> None:
            try:
                there.append(await httpcore.TrioBackend.connect_tcp(self, address, port))
            except httpcore.ConnectError as error:
                failed.append(error)
                has_failed.set()
            else:
                nursery.cancel_scope.cancel()

        best: list[httpcore.AsyncNetworkStream] = []
        try:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    has_failed = trio.Event()
                    nursery.start_soon(connect, address, has_failed)
                    with trio.move_on_after(_NEXT_S):
                        await has_failed.wait()
            best = there[:1]
        finally:
            with trio.CancelScope(shield=True):
                for late in there[len(best) :]:
                    await late.aclose()
        if not best:
            raise failed[0]
        return best[0]


def direct(names: Names, named_by: str, context: SSLContext) -> httpcore.AsyncConnectionPool:
    """Return connections to one host, which the configuration or `named_by` named."""
    return httpcore.AsyncConnectionPool(
        ssl_context=context,
        max_connections=None,
        max_keepalive_connections=_IDLE,
        keepalive_expiry=_IDLE_S,
        network_backend=_Backend(names, named_by),
    )


def parse_proxy(url: str) -> httpcore.Proxy:
    """Return the proxy that a URL names, with user and password if it has some. InvalidArgument."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PROXY_PORTS[parts.scheme]
        host = str(parts.hostname or "").encode("ascii").decode()
    except (ValueError, KeyError):
        host, port = "", 0
    if not host:  # not quoted: it may hold a password
        raise InvalidArgument("the proxy is no http or https URL, as http://proxy.example:3128")
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    place = f"[{host}]" if ":" in host else host
    return httpcore.Proxy(f"{parts.scheme}://{place}:{port}", auth=auth)


def through(proxy: httpcore.Proxy, context: SSLContext) -> httpcore.AsyncConnectionPool:
    """Return connections to one host by way of a proxy, which resolves names."""
    return httpcore.AsyncConnectionPool(
        ssl_context=context,
        proxy=proxy,
        max_connections=None,
        max_keepalive_connections=_IDLE,
        keepalive_expiry=_IDLE_S,
        network_backend=httpcore.TrioBackend(),
    )
