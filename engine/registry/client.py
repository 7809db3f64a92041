"""Reads from registries: what a name means, documents, blobs from any byte on, what refers to an image.

Async. The hosts of a registry are asked in order; the next one where one does not answer, does not have
it, or lies. Once a name is resolved all is asked for by digest, which decides what is taken.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TypeVar

import msgspec
import trio

from engine import limits
from engine.errors import (
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Refused,
    Unavailable,
)
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor, parse_index
from engine.oci.mediatypes import INDEXES, MANIFESTS, OCI_INDEX
from engine.oci.reference import Reference
from engine.registry.addresses import Policy, is_open
from engine.registry.asking import Admit, Asking
from engine.registry.connections import Answer, Connections
from engine.registry.credentials import Credential, Credentials, nobody
from engine.registry.hosts import Capability, Host
from engine.registry.hosts_folder import HostsFolder
from engine.registry.protocol import (
    ACCEPT,
    BadAnswer,
    NobodyElse,
    Request,
    blob_path,
    check_digest,
    content_length,
    document_type,
    manifest_path,
    next_page,
    part,
    referrers_path,
    referrers_tag,
    scope_of,
    stated_digest,
)
from engine.registry.retrying import PASSING, Patience

__all__ = ["Access", "Body", "Client", "Found", "open_client"]

T = TypeVar("T")


_NOT_THERE = frozenset({404, 405})
_NO_HEAD = frozenset(range(400, 600)) - PASSING - {401}  # asked again by GET, which says why
_NO_RANGE = 416


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How registries are reached; `hosts` and `credentials` may block."""

    hosts: Callable[[str], Sequence[Host]] = field(default_factory=HostsFolder)
    credentials: Credentials = nobody
    proxy: str | None = None
    """The URL of an HTTP proxy; none is taken from the environment."""
    patience: Patience = field(default_factory=Patience)
    may_lead_to: Policy = is_open
    """To which addresses the names may lead that others give: in redirects, as servers of tokens."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a reference means, and the document itself if that had to be read to find out."""

    descriptor: Descriptor
    data: bytes | None = None
    credential: Credential | None = None
    """Who had to ask; None where anyone may."""


AskPart = Callable[[int, int], AbstractAsyncContextManager["Body"]]


class Body:
    """The rest of a blob from a byte on, or a part of that, as it comes from `host`."""

    def __init__(
        self, answer: Answer, host: Host, request: Request, span: tuple[int, int], ask_part: "AskPart"
    ) -> None:
        """Read what is asked for of an answer, which holds a span of the blob."""
        start, self.end = span
        self.host = host.origin.name
        self.is_as_asked = answer.status == 206 and request.end == self.end
        """Whether it ends where it was asked to: then other parts can be had, too."""
        self._answer = answer
        self._skipped = request.offset - start
        self._left = self.end - request.offset
        self._ask_part = ask_part

    def part(self, start: int, end: int) -> AbstractAsyncContextManager["Body"]:
        """Ask the same host for another part, once. Raises Unavailable, PermissionDenied, BadAnswer."""
        return self._ask_part(start, end)

    async def aclose(self) -> None:
        """Let go of the connection before the block ends."""
        await self._answer.aclose()

    async def read(self) -> bytes:
        """Return some more bytes, none at the end. Raises Unavailable, BadAnswer."""
        while True:
            try:
                chunk = await self._answer.read()
            except Unavailable:
                if self._left:
                    raise
                return b""  # all is here, though the host did not say so
            if not chunk and self._left:
                raise Unavailable(f"{self.host} broke off {self._left} bytes before the end")
            skipped = min(self._skipped, len(chunk))
            self._skipped -= skipped
            if len(chunk) - skipped > self._left:
                raise BadAnswer(f"{self.host} sends more bytes than there are of the blob")
            self._left -= len(chunk) - skipped
            if not chunk or skipped < len(chunk):
                return chunk[skipped:]


class Client:
    """Open one with `open_client`; its methods may run concurrently."""

    def __init__(self, access: Access, connections: Connections) -> None:
        self.patience = access.patience
        self._access = access
        agent = f"lamina/{version('lamina')}"
        self.asking = Asking(connections, access.credentials, access.patience, agent)
        self._hosts: dict[str, Sequence[Host]] = {}

    async def resolve(self, reference: Reference) -> Found:
        """Return what a reference means now. Raises NotFound, Unavailable, PermissionDenied, Refused."""
        # Read anew for each: someone may have changed them.
        domain = reference.domain
        self._hosts[domain] = await trio.to_thread.run_sync(self._access.hosts, domain)
        capability = Capability.PULL if reference.digest else Capability.RESOLVE
        name = reference.digest or reference.tag or ""
        request = Request(
            path=manifest_path(reference.path, name),
            what=str(reference),
            scope=scope_of(reference.path),
            accept=ACCEPT,
            whole=limits.MANIFEST,
        )

        async def at(host: Host, is_last: bool) -> Found:
            looked = await self._looked_at(host, request, reference.digest, is_last)
            found = looked or await self._read(host, request, reference.digest, is_last)
            return replace(found, credential=self.asking.credential(host))

        return await self._first(domain, capability, at)

    async def _looked_at(
        self, host: Host, request: Request, digest: Digest | None, is_last: bool
    ) -> Found | None:
        """Return what the header of a document says, None if that is not enough."""
        head = msgspec.structs.replace(request, method="HEAD")
        async with self.asking.ask(host, head, known=_NO_HEAD, is_last=is_last) as answer:
            stated = stated_digest(answer.header("Docker-Content-Digest"))
            size = content_length(answer.header("Content-Length"))
            if answer.status != 200 or not stated or not size or (digest and stated != digest):
                return None
            kind = document_type(answer.header("Content-Type") or "", None, request.what)
        if not kind:
            return None
        if size > limits.MANIFEST:
            raise BadAnswer(f"{request.what} is over {limits.MANIFEST} bytes")
        return Found(Descriptor(media_type=kind, digest=stated, size=size))

    async def _read(self, host: Host, request: Request, digest: Digest | None, is_last: bool) -> Found:
        async with self.asking.ask(host, request, is_last=is_last) as answer:
            data = answer.data
            stated = digest or stated_digest(answer.header("Docker-Content-Digest"))
            content_type = answer.header("Content-Type") or ""
        if stated:
            check_digest(data, stated, f"{request.what}, as {host.origin.name} sent it,")
        kind = document_type(content_type, data, request.what)
        descriptor = Descriptor(media_type=kind, digest=stated or digest_of(data), size=len(data))
        return Found(descriptor, data)

    async def document(self, reference: Reference, descriptor: Descriptor, limit: int) -> bytes:
        """Return a manifest, index or config whole, verified. Raises what `resolve` does."""
        if descriptor.size > limit:
            raise Refused(f"{descriptor.digest} has {descriptor.size} bytes, too many for its kind")
        digest = descriptor.key
        is_manifest = descriptor.media_type in INDEXES | MANIFESTS
        path = (
            manifest_path(reference.path, digest) if is_manifest else blob_path(reference.path, digest)
        )
        what = f"{digest} of {reference}"
        request = Request(
            path=path,
            what=what,
            scope=scope_of(reference.path),
            accept=f"{descriptor.media_type}, */*" if is_manifest else "*/*",
            whole=descriptor.size,
        )

        async def at(host: Host, is_last: bool) -> bytes:
            async with self.asking.ask(host, request, is_last=is_last) as answer:
                data = answer.data
            if len(data) < descriptor.size:
                raise BadAnswer(f"it sent {len(data)} bytes of {what}, which has {descriptor.size}")
            check_digest(data, digest, f"{what}, as {host.origin.name} sent it,")
            return data

        return await self._first(reference.domain, Capability.PULL, at)

    @asynccontextmanager
    async def blob(
        self,
        reference: Reference,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        end: int | None = None,
        avoid: Collection[str] = (),
        admit: Admit = nullcontext,
    ) -> AsyncIterator[Body]:
        """Give a blob from `offset` on for the length of the block, but not from hosts to `avoid`.

        With `end` it is asked for up to there; a host may well send all of it.
        `admit` is entered with the host's name while the host has a request.
        """
        request = Request(
            path=blob_path(reference.path, descriptor.key),
            what=f"{descriptor.digest} of {reference}",
            scope=scope_of(reference.path),
            offset=offset,
            end=end,
        )
        async with AsyncExitStack() as stack:

            async def at(host: Host, is_last: bool) -> Body:
                async with AsyncExitStack() as attempt:
                    body = await self._body(
                        attempt, host, request, descriptor.size, is_last=is_last, admit=admit
                    )
                    stack.push_async_exit(attempt.pop_all())
                    return body

            yield await self._first(reference.domain, Capability.PULL, at, avoid)

    async def _body(
        self,
        stack: AsyncExitStack,
        host: Host,
        request: Request,
        size: int,
        *,
        is_last: bool,
        admit: Admit,
    ) -> Body:
        ask = partial(self.asking.ask, host, is_last=is_last, admit=admit)
        answer = await stack.enter_async_context(ask(request, known={_NO_RANGE}))
        if answer.status == _NO_RANGE:
            await stack.aclose()
            whole = msgspec.structs.replace(request, offset=0, end=None)
            answer = await stack.enter_async_context(ask(whole))
        ask_part = partial(self._part, host, request, size)
        return Body(answer, host, request, _span(answer, request, size), ask_part)

    @asynccontextmanager
    async def _part(
        self, host: Host, request: Request, size: int, start: int, end: int
    ) -> AsyncIterator[Body]:
        asked = msgspec.structs.replace(request, offset=start, end=end)
        async with self.asking.ask_once(host, asked) as answer:
            ask_part = partial(self._part, host, request, size)
            found = Body(answer, host, asked, _span(answer, asked, size), ask_part)
            if not found.is_as_asked:
                raise BadAnswer("it sends another part than was asked for")
            yield found

    async def referrers(
        self, reference: Reference, digest: Digest, artifact_type: str = ""
    ) -> list[Descriptor]:
        """Return what refers to a manifest, of one type or any. Raises what `resolve` does."""

        async def at(host: Host, is_last: bool) -> list[Descriptor]:
            found = await self._listed(host, reference, digest, is_last)
            return [one for one in found if artifact_type in {"", one.artifact_type}]

        return await self._first(reference.domain, Capability.REFERRERS, at)

    async def _listed(
        self, host: Host, reference: Reference, digest: Digest, is_last: bool
    ) -> list[Descriptor]:
        what = f"what refers to {digest} of {reference}"
        request = Request(
            path=referrers_path(reference.path, digest),
            what=what,
            scope=scope_of(reference.path),
            accept=OCI_INDEX,
            whole=limits.MANIFEST,
        )
        found: list[Descriptor] = []
        seen = {request}
        while True:
            async with self.asking.ask(host, request, known=_NOT_THERE, is_last=is_last) as answer:
                if answer.status in _NOT_THERE:
                    return await self._tagged(host, reference, digest, is_last)
                data = answer.data
                link = answer.header("Link") or ""
            found += parse_index(data, OCI_INDEX, what).manifests
            if len(found) > limits.REFERRERS:
                raise BadAnswer(f"it lists over {limits.REFERRERS} of {what}")
            page = next_page(host.origin, host.path + request.path, link)
            if page is None:
                return found
            path, _, query = page.removeprefix(host.path).partition("?")
            request = msgspec.structs.replace(request, path=path, query=query)
            if request in seen or len(seen) >= limits.REFERRER_PAGES:
                raise BadAnswer(f"its pages of {what} do not end")
            seen.add(request)

    async def _tagged(
        self, host: Host, reference: Reference, digest: Digest, is_last: bool
    ) -> list[Descriptor]:
        """Return what is listed under the tag that stands for the list where hosts have none."""
        request = Request(
            path=manifest_path(reference.path, referrers_tag(digest)),
            what=f"what refers to {digest} of {reference}",
            scope=scope_of(reference.path),
            accept=OCI_INDEX,
            whole=limits.MANIFEST,
        )
        try:
            async with self.asking.ask(host, request, is_last=is_last) as answer:
                data = answer.data
        except NotFound:
            return []
        return parse_index(data, OCI_INDEX, request.what).manifests[: limits.REFERRERS]

    async def destination(self, domain: str) -> Host:
        """Return the host that takes what is pushed to a registry. FailedPrecondition if none does."""
        return (await self._able(domain, Capability.PUSH))[0]

    async def _able(self, domain: str, capability: Capability) -> list[Host]:
        if domain not in self._hosts:
            self._hosts[domain] = await trio.to_thread.run_sync(self._access.hosts, domain)
        able = [host for host in self._hosts[domain] if capability in host.capabilities]
        if not able:
            raise FailedPrecondition(
                f"no host of {domain} may be asked to {capability}; see its hosts.toml (`capabilities`)"
            )
        return able

    async def _first(
        self,
        domain: str,
        capability: Capability,
        at: Callable[[Host, bool], Awaitable[T]],
        avoid: Collection[str] = (),
    ) -> T:
        """Return what the first host gives that can; else raise what the last one, its own, said."""
        able = await self._able(domain, capability)
        hosts = [host for host in able if host.origin.name not in avoid]
        failure: EngineError = NobodyElse(f"there is no other host of {domain}")
        for host in hosts:
            try:
                return await at(host, host is hosts[-1])
            except BadAnswer as error:
                failure = BadAnswer(f"{host.origin.name}: {error}")
            except (Unavailable, NotFound, PermissionDenied, DigestMismatch) as error:
                failure = error
        raise failure


def _span(answer: Answer, request: Request, size: int) -> tuple[int, int]:
    """Return where what an answer sends begins and ends in a blob of `size` bytes."""
    start, end = 0, size
    if answer.status == 206:
        start, end = part(answer.header("Content-Range") or "", size)
        if start != request.offset:
            raise BadAnswer(f"it sent bytes from {start} on, not from {request.offset}")
    length = content_length(answer.header("Content-Length"))
    if length is not None and length != end - start:
        raise BadAnswer(f"it sends {length} bytes of {request.what}, not {end - start}")
    return start, end


@asynccontextmanager
async def open_client(access: Access) -> AsyncIterator[Client]:
    """Give a client whose connections last as long as the block."""
    connections = Connections(access.patience, access.proxy, access.may_lead_to)
    try:
        yield Client(access, connections)
    finally:
        with trio.CancelScope(shield=True):
            await connections.aclose()
