"""One question to one host: authorised, redirected, asked again while it is busy.

Async. An answer is 200, 206, or what the asker says that it knows; anything else is an error.
"""

import random
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime

import trio

from engine import limits
from engine.errors import NotFound, PermissionDenied, Unavailable
from engine.registry.challenge import parse_challenges
from engine.registry.connections import Answer, Connections, Peer
from engine.registry.credentials import Credential, Credentials
from engine.registry.hosts import Host
from engine.registry.protocol import BadAnswer, Request, explained, redirected
from engine.registry.retrying import PASSING, Busy, Patience, parse_retry_after
from engine.registry.tokens import Authority

__all__ = ["Admit", "Asking"]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GOOD = frozenset({200, 206})

Admit = Callable[[str], AbstractAsyncContextManager[object]]
"""Wait until a host may be asked, and until the answer is let go."""


class Asking:
    """Asks hosts, and remembers what each wants for authorisation."""

    def __init__(
        self, connections: Connections, credentials: Credentials, patience: Patience, agent: str
    ) -> None:
        self._connections = connections
        self._credentials = credentials
        self._patience = patience
        self._agent = agent
        self._authorities: dict[Peer, Authority] = {}

    @asynccontextmanager
    async def ask(
        self,
        host: Host,
        request: Request,
        *,
        known: Collection[int] = (),
        is_last: bool = True,
        admit: Admit = nullcontext,
    ) -> AsyncIterator[Answer]:
        """Give the answer of a host for the length of the block.

        Where there is another host to ask, this one is asked twice only. Raises Unavailable, NotFound,
        PermissionDenied, BadAnswer.
        """
        async with AsyncExitStack() as stack:
            yield await self._patiently(stack, host, request, known, is_last=is_last, admit=admit)

    def credential(self, host: Host) -> Credential | None:
        """Return the credential that a host has asked for, None while it lets anyone in."""
        authority = self._authorities.get(Peer(host.origin, host.tls))
        return authority.credential if authority else None

    @asynccontextmanager
    async def ask_once(
        self, host: Host, request: Request, *, known: Collection[int] = ()
    ) -> AsyncIterator[Answer]:
        """Give an answer as `ask` does, for who knows himself what to do where there is none."""
        async with AsyncExitStack() as stack:
            yield await self._known(stack, host, request, known)

    async def _patiently(
        self,
        stack: AsyncExitStack,
        host: Host,
        request: Request,
        known: Collection[int],
        *,
        is_last: bool,
        admit: Admit,
    ) -> Answer:
        failed = 0
        while True:
            async with AsyncExitStack() as attempt:
                await attempt.enter_async_context(admit(host.origin.name))
                try:
                    answer = await self._known(attempt, host, request, known)
                    if request.whole is not None and answer.status in _GOOD:
                        answer.data = await answer.whole(request.whole, request.what)
                except Unavailable as error:
                    failed += 1
                    wait = self._patience.wait(failed, error, random.random())
                    if wait is None or (not is_last and failed > 1):
                        raise
                else:
                    stack.push_async_exit(attempt.pop_all())
                    return answer
            await trio.sleep(wait)

    async def _known(
        self, stack: AsyncExitStack, host: Host, request: Request, known: Collection[int]
    ) -> Answer:
        answer = await self._asked(stack, host, request)
        if answer.status not in _GOOD and answer.status not in known:
            raise await _error(host, request, answer, self._secrets(host))
        return answer

    def _secrets(self, host: Host) -> Iterator[str]:
        yield from (value for _, value in host.headers)
        if authority := self._authorities.get(Peer(host.origin, host.tls)):
            yield from authority.secrets()

    async def _asked(self, stack: AsyncExitStack, host: Host, request: Request) -> Answer:
        """Return an answer that is neither a redirect nor a question who we are."""
        peer = Peer(host.origin, host.tls)
        authority = self._authorities.get(peer)
        if authority is None:
            authority = Authority(peer, self._connections, self._credentials)
            self._authorities[peer] = authority
        header = await authority.header(request.scope)
        answer = await self._followed(stack, host, request, header)
        if answer.status == 401 and answer.peer == peer:
            challenges = parse_challenges(answer.headers("WWW-Authenticate"))
            await answer.aclose()
            header = await authority.answered(challenges, request.scope, header)
            if isinstance(request.body, AsyncIterable):
                raise Busy(f"{host.origin.name} wants to know again who sends {request.what}")
            answer = await self._followed(stack, host, request, header)
        return answer

    async def _followed(
        self, stack: AsyncExitStack, host: Host, request: Request, authorization: str | None
    ) -> Answer:
        """Follow redirects; what only the configured host may see stays behind at another."""
        peer = Peer(host.origin, host.tls)
        public = {"Accept": request.accept, "Accept-Encoding": "identity", "User-Agent": self._agent}
        if request.offset or request.end:
            public["Range"] = f"bytes={request.offset}-{request.end - 1 if request.end else ''}"
        public |= request.about_body
        secret = dict(host.headers)
        if authorization:
            secret["Authorization"] = authorization
        url = request.url(host)
        origin = peer.origin
        for _ in range(limits.REDIRECTS + 1):
            headers: Mapping[str, str] = {**public, **secret} if origin == host.origin else public
            exchange = self._connections.exchange(
                peer, request.method, url, headers, request.body, slow=request.slow
            )
            answer = await stack.enter_async_context(exchange)
            location = answer.header("Location")
            if answer.status not in _REDIRECTS or location is None:
                return answer
            if request.is_write:
                raise BadAnswer(f"it redirects what is to be written ({request.method})")
            await answer.aclose()
            origin, rest = redirected(origin, url.removeprefix(str(origin)), location)
            peer = Peer(host.origin, host.tls).named(origin)
            url = f"{origin}{rest}"
            if origin != host.origin:
                secret = {}  # nor if it leads back
        raise BadAnswer(f"it redirects over {limits.REDIRECTS} times")


async def _error(host: Host, request: Request, answer: Answer, secrets: Iterable[str]) -> Exception:
    said = explained(await answer.beginning(limits.ERROR_BODY), secrets)
    name, more = host.origin.name, f" ({said})" if said else ""
    via = f" by way of {answer.peer.origin.name}" if answer.peer.origin != host.origin else ""
    match answer.status:
        case 404 | 410:
            doing = "takes no" if request.is_write else "has no"
            return NotFound(f"{name} {doing} {request.what}{more}")
        case 401 | 403:
            doing = "write" if request.is_write else "read"
            return PermissionDenied(
                f"{name} does not let you {doing} {request.what}{via}{more}; log in to it"
            )
        case status if status in PASSING:
            after = parse_retry_after(answer.header("Retry-After") or "", datetime.now(UTC))
            return Busy(
                f"{name} answered {status} for {request.what}{via}{more}; try again later", after
            )
        case status:
            return BadAnswer(f"it answered {status} for {request.what}{via}{more}")
