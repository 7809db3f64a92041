"""Sends blobs, manifests and lists of referrers to one repository: only what is not there.

Async. A blob that breaks off goes on where the host says that it stopped. What is sent goes to the
configured host alone, wherever an answer points to (R-02).
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from engine import limits
from engine.content.closure import Document
from engine.errors import NotFound, PermissionDenied, Refused, Unavailable
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor, Index, Manifest, parse_index
from engine.oci.mediatypes import OCI_INDEX
from engine.oci.reference import Reference
from engine.progress import Report, Step, silent
from engine.registry.hosts import Host
from engine.registry.lanes import ImageLanes
from engine.registry.protocol import (
    BadAnswer,
    Request,
    blob_path,
    content_length,
    manifest_path,
    received,
    referrers_path,
    referrers_tag,
    scope_of,
    stated_digest,
    upload_place,
    uploads_path,
)

if TYPE_CHECKING:  # which load httpcore: not for those who have a client handed to them
    from engine.registry.asking import Asking
    from engine.registry.client import Client
    from engine.registry.connections import Answer

__all__ = ["Outgoing", "Readable", "Uploader", "Way"]

_ABSENT = frozenset({404, 405})
_CREATED = frozenset({201, 204})
_ACCEPTED = 202
_GOES_ON = frozenset({200, 201, 202, 204})
_UNKNOWN = frozenset({404, 410})
_FORGOTTEN = _UNKNOWN | {400, 405, 416}  # docker's, once a part has broken off
_TOO_LARGE = 413
_ELSEWHERE = 416  # it has another part than the one that this would be added to
_NOT_MOUNTED = frozenset({400, 401, 403, 404, 405, 415})


class Way(StrEnum):
    """How something came to be in a repository."""

    THERE = "there"
    MOUNTED = "mounted"
    SENT = "sent"


class Readable(Protocol):
    """Bytes in order."""

    async def read(self) -> bytes:
        """Return some more bytes, none at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A blob that is to be in a repository, and how it is read from a byte on."""

    descriptor: Descriptor
    read: Callable[[int], AbstractAsyncContextManager[Readable]]
    elsewhere: str = ""
    """A repository of the same registry that has it, too."""
    report: Report = silent


class _Lost(Unavailable):
    """A host knows no more of an upload that it had begun."""


class Uploader:
    """Sends to the repository of a reference, at one host."""

    def __init__(self, client: "Client", host: Host, reference: Reference, lanes: ImageLanes) -> None:
        self.lanes = lanes
        self.asking = client.asking
        self.patience = client.patience
        self.host = host
        self.reference = reference
        self.scope = scope_of(reference.path, "pull,push")

    async def blob(self, outgoing: Outgoing) -> Way:
        """Send a blob unless it is there. Raises Unavailable, PermissionDenied, Refused and others."""
        try:
            return await _Upload(self, outgoing).run()
        except BadAnswer as error:
            raise BadAnswer(f"{self.host.origin.name}: {error}") from None

    async def manifest(self, document: Document, name: str) -> Way:
        """Have a manifest or an index under a digest or a tag; all that it lists is there."""
        try:
            return await self._manifest(document, name)
        except BadAnswer as error:
            raise BadAnswer(f"{self.host.origin.name}: {error}") from None

    async def _manifest(self, document: Document, name: str) -> Way:
        descriptor = document.descriptor
        request = self.request(
            manifest_path(self.reference.path, name),
            f"{descriptor.digest} of {self.reference}",
            accept=descriptor.media_type,
        )
        head = msgspec.structs.replace(request, method="HEAD")
        async with self.asking.ask(self.host, head, known=_ABSENT) as answer:
            stated = stated_digest(answer.header("Docker-Content-Digest"))
            is_there = answer.status not in _ABSENT and stated == descriptor.key
        is_listed = not is_there and await self._put(request, descriptor, document.data)
        subject = document.content.subject
        if subject and not is_listed:
            await self._list(subject.key, _as_referrer(document))
        return Way.THERE if is_there else Way.SENT

    async def _put(self, request: Request, descriptor: Descriptor, data: bytes) -> bool:
        """Send a manifest; say whether the host has listed it for its subject by itself."""
        put = msgspec.structs.replace(
            request, method="PUT", body=data, about_body=(("Content-Type", descriptor.media_type),)
        )
        async with self.asking.ask(self.host, put, known=_CREATED) as answer:
            self.check_created(answer, descriptor.key)
            return answer.header("OCI-Subject") is not None

    def check_created(self, answer: "Answer", digest: Digest) -> None:
        """Raise BadAnswer unless a host says that it took what was sent, and nothing else."""
        if answer.status not in _CREATED:  # a page to log in, for one
            raise BadAnswer(f"it answered {answer.status} for {digest}, not that it took it")
        stated = stated_digest(answer.header("Docker-Content-Digest"))
        if stated and stated.partition(":")[0] == digest.partition(":")[0] and stated != digest:
            raise BadAnswer(f"it took {stated} where {digest} was sent")

    # -- referrers ----------------------------------------------------------------------------

    async def _list(self, subject: Digest, referrer: Descriptor) -> None:
        """List what refers to a manifest under the tag for that, where the host does not by itself."""
        what = f"what refers to {subject} of {self.reference}"
        listed = self.request(referrers_path(self.reference.path, subject), what, accept=OCI_INDEX)
        async with self.asking.ask(self.host, listed, known=_ABSENT) as answer:
            if answer.status not in _ABSENT:
                return
        path = manifest_path(self.reference.path, referrers_tag(subject))
        request = self.request(path, what, accept=OCI_INDEX)
        index = Index(schema_version=2, media_type=OCI_INDEX, manifests=[])
        async with self.asking.ask(self.host, request, known=_ABSENT) as answer:
            if answer.status not in _ABSENT:
                index = parse_index(await answer.whole(limits.MANIFEST, what), OCI_INDEX, what)
        if any(one.digest == referrer.digest for one in index.manifests):
            return
        index = msgspec.structs.replace(index, manifests=[*index.manifests, referrer])
        data = msgspec.json.encode(index)
        descriptor = Descriptor(media_type=OCI_INDEX, digest=digest_of(data), size=len(data))
        await self._put(request, descriptor, data)

    def request(self, path: str, what: str, *, method: str = "GET", accept: str = "*/*") -> Request:
        """Return a question about this repository."""
        return Request(path=path, what=what, scope=self.scope, method=method, accept=accept)


def _as_referrer(document: Document) -> Descriptor:
    content = document.content
    kind = content.artifact_type
    if not kind and isinstance(content, Manifest):
        kind = content.config.media_type
    return Descriptor(
        media_type=document.descriptor.media_type,
        digest=document.descriptor.digest,
        size=document.descriptor.size,
        artifact_type=kind,
        annotations=content.annotations,
    )


class _Upload:
    """One blob on its way: where to, and how much of it is there."""

    def __init__(self, uploader: Uploader, outgoing: Outgoing) -> None:
        self._to = uploader
        self._outgoing = outgoing
        self._digest = outgoing.descriptor.key
        self._size = outgoing.descriptor.size
        self._elsewhere = outgoing.elsewhere
        self._part = self._size  # bytes to send at once
        self._place = ""  # of the upload, nothing before it has begun
        self._offset = 0
        self._furthest = 0
        self._is_doubtful = False  # whether only the host knows how much is there
        self._is_patched = False  # whether it went in several parts
        self._is_second = False  # whether it did so before, and that came out wrong

    async def run(self) -> Way:
        """Send what is missing, however often it breaks off as long as it gets on."""
        failed = 0
        self._show(0)
        while True:
            before = self._furthest
            try:
                async with self._to.lanes.lane(self._to.host.origin.name):
                    way = await self._attempt()
            except Unavailable as error:
                # By bytes, a host could have the rest of a blob sent for each of them.
                failed = 1 if self._furthest - before >= limits.PROGRESS_BYTES else failed + 1
                wait = self._to.patience.wait(failed, error, random.random())
                if wait is None:
                    raise
                await trio.sleep(wait)
            except BadAnswer:
                # In several parts something may have come twice, or not at all: once more in one.
                if not self._is_patched or self._is_second:
                    raise
                self._is_second = True
                self._begin_anew()
            else:
                self._show(self._size)
                return way

    async def _attempt(self) -> Way:
        if self._is_doubtful:
            await self._recall()
        if not self._place:
            if await self._is_there():
                return Way.THERE
            if await self._begin():
                return Way.MOUNTED
        whole = self._size <= limits.PUSH_WHOLE and not self._offset
        while self._offset < self._size and not whole:
            await self._send()
        await self._finish(whole=whole)
        return Way.SENT

    async def _is_there(self) -> bool:
        request = self._request("HEAD", path=blob_path(self._to.reference.path, self._digest))
        async with self._asking.ask_once(self._to.host, request, known=_ABSENT) as answer:
            if answer.status in _ABSENT:
                return False
            size = content_length(answer.header("Content-Length"))
            if size is not None and size != self._size:
                raise BadAnswer(f"it has {size} bytes as {self._digest}, which has {self._size}")
            return size is not None

    async def _begin(self) -> bool:
        """Begin an upload; True if there is none needed, as the host has the blob elsewhere."""
        elsewhere, self._elsewhere = self._elsewhere, ""
        path = uploads_path(self._to.reference.path)
        if elsewhere:
            mount = self._request("POST", path=path, query=f"mount={self._digest}&from={elsewhere}")
            scope = f"{mount.scope} {scope_of(elsewhere)}"
            mount = msgspec.structs.replace(mount, scope=scope)
            known = _CREATED | _NOT_MOUNTED | {_ACCEPTED}
            try:
                async with self._asking.ask_once(self._to.host, mount, known=known) as answer:
                    if answer.status in _CREATED:
                        self._to.check_created(answer, self._digest)
                        return True
                    if answer.status == _ACCEPTED:
                        self._go_on(answer, path, 0)
                        return False
            except PermissionDenied:
                pass  # for the other repository
        request = self._request("POST", path=path)
        async with self._asking.ask_once(self._to.host, request, known={_ACCEPTED}) as answer:
            self._go_on(answer, path, 0)
        return False

    async def _send(self) -> None:
        """Send the next part, all that is left unless the host wants less."""
        start, end = self._offset, min(self._size, self._offset + self._part)
        about = [("Content-Type", "application/octet-stream"), ("Content-Length", str(end - start))]
        if start or end < self._size:
            about.append(("Content-Range", f"{start}-{end - 1}"))
            self._is_patched = True
        async with self._outgoing.read(start) as source:
            request = self._request("PATCH", body=_Body(source, start, end, self._passed))
            request = msgspec.structs.replace(request, about_body=(*about,))
            self._is_doubtful = True
            known = _GOES_ON | _UNKNOWN | {_TOO_LARGE, _ELSEWHERE}
            async with self._asking.ask_once(self._to.host, request, known=known) as answer:
                self._check_going_on(answer, end - start)
                count = received(answer.header("Range"), end)
                if count is None or count <= start:
                    raise Unavailable(f"{self._to.host.origin.name} took nothing of {self._what}")
                self._go_on(answer, self._place, count)
        if count < end and count - start < limits.PROGRESS_BYTES:
            name = self._to.host.origin.name
            raise Unavailable(f"{name} took {count - start} bytes at once of {self._what}")

    def _check_going_on(self, answer: "Answer", sent: int) -> None:
        name = self._to.host.origin.name
        if answer.status in _UNKNOWN:
            self._begin_anew()
            raise _Lost(f"{name} knows no more of the upload of {self._what}")
        if answer.status == _ELSEWHERE:
            raise Unavailable(f"{name} has another part of {self._what} than it was sent")
        if answer.status == _TOO_LARGE:
            if sent <= limits.PUSH_PART:
                raise Refused(f"{name} does not take {sent} bytes at once; a proxy before it may not")
            self._part = limits.PUSH_PART
            raise Unavailable(f"{name} does not take {sent} bytes at once")

    async def _recall(self) -> None:
        """Ask how much is there; begin anew where that cannot be told."""
        request = self._request("GET")
        known = _GOES_ON | _FORGOTTEN
        async with self._asking.ask_once(self._to.host, request, known=known) as answer:
            text = answer.header("Range")
            count = received(text, self._size) if text and answer.status in _GOES_ON else None
            if count is None:
                self._begin_anew()
            else:
                self._go_on(answer, self._place, count)

    async def _finish(self, *, whole: bool) -> None:
        """Say that this was all, and of what digest; a small blob goes with that."""
        join = "&" if "?" in self._place else "?"
        request = self._request("PUT", place=f"{self._place}{join}digest={self._digest}")
        request = msgspec.structs.replace(request, slow=self._size / self._to.patience.finish)
        self._is_doubtful = True
        if whole:
            async with self._outgoing.read(0) as source:
                data = b"".join([piece async for piece in _Body(source, 0, self._size, self._passed)])
            about = (("Content-Type", "application/octet-stream"),)
            request = msgspec.structs.replace(request, body=data, about_body=about)
            self._begin_anew()  # if it breaks off
        known = _CREATED | _UNKNOWN | {_ELSEWHERE}
        async with self._asking.ask_once(self._to.host, request, known=known) as answer:
            self._check_going_on(answer, 0)
            self._to.check_created(answer, self._digest)

    # -- where it stands ----------------------------------------------------------------------

    def _go_on(self, answer: "Answer", path: str, offset: int) -> None:
        host = self._to.host
        location = answer.header("Location")
        if location or not self._place:
            asked = f"{host.path}{path}" if not self._place else path
            self._place = upload_place(host.origin, asked, location)
        self._offset = offset
        self._furthest = max(self._furthest, offset)
        self._is_doubtful = False

    def _begin_anew(self) -> None:
        self._place = ""
        self._offset = 0
        self._is_doubtful = self._is_patched = False

    @property
    def _asking(self) -> "Asking":
        return self._to.asking

    @property
    def _what(self) -> str:
        return f"{self._digest} of {self._to.reference}"

    def _request(
        self,
        method: str,
        *,
        path: str = "",
        query: str = "",
        place: str = "",
        body: "_Body | None" = None,
    ) -> Request:
        place = place or ("" if path else self._place)
        request = self._to.request(path, self._what, method=method)
        return msgspec.structs.replace(request, query=query, place=place, body=body)

    async def _passed(self, count: int, done: int) -> None:
        await self._to.lanes.passed(count)
        self._show(done)

    def _show(self, done: int) -> None:
        descriptor = self._outgoing.descriptor
        self._outgoing.report(Step.PUSH, descriptor.digest, descriptor.size, done)


class _Body:
    """The bytes of a part, once; a class, so that a request that breaks off leaves nothing open."""

    def __init__(
        self, source: Readable, start: int, end: int, passed: Callable[[int, int], Awaitable[None]]
    ) -> None:
        self._source = source
        self._offset = start
        self._end = end
        self._passed = passed

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._offset >= self._end:
            raise StopAsyncIteration
        chunk = await self._source.read()
        if not chunk:
            raise NotFound("a blob ended before its end")
        chunk = chunk[: self._end - self._offset]
        self._offset += len(chunk)
        await self._passed(len(chunk), self._offset)
        return chunk
