"""Sends all that a document leads to, in an order that leaves no tag on what is not whole.

Async. Blobs first, several at once; then manifests, then the indexes above them, the tag last.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

import trio

from engine import limits
from engine.content.closure import Closure, Document
from engine.errors import EngineError, InvalidArgument
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor, Manifest
from engine.oci.mediatypes import is_distributable
from engine.oci.reference import Reference
from engine.progress import Report
from engine.registry.lanes import ImageLanes
from engine.registry.uploading import Outgoing, Readable, Uploader, Way

if TYPE_CHECKING:  # which loads httpcore: not for those who have a client handed to them
    from engine.registry.client import Client

__all__ = ["Pushed", "Sending", "check_named"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What is in a registry now, by a name, and how each part of it came there."""

    reference: Reference
    target: Descriptor
    ways: dict[Digest, Way] = field(default_factory=dict)
    bytes_sent: int = 0
    left_out: tuple[Descriptor, ...] = ()
    """Layers that are not to be distributed."""


def check_named(reference: Reference, target: Descriptor) -> None:
    """Raise InvalidArgument for a name that has the digest of something else."""
    if reference.digest and reference.digest != target.digest:
        raise InvalidArgument(
            f"{reference} names another digest than {target.digest}, which was to be pushed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How to send: to whom, by which name, and where the bytes are."""

    client: "Client"
    lanes: ImageLanes
    reference: Reference
    read: Callable[[Descriptor, int], AbstractAsyncContextManager[Readable]]
    """Give a blob from a byte on."""
    elsewhere: Callable[[Descriptor], Collection[str]]
    """Return repositories of the same registry that may have a blob."""
    report: Report

    async def run(self, root: Descriptor, found: Closure) -> Pushed:
        """Send what is not there of `found`, and give `root` its name then."""
        host = await self.client.destination(self.reference.domain)
        to = Uploader(self.client, host, self.reference, self.lanes)
        ways: dict[Digest, Way] = {}
        blobs = [blob for blob in found.blobs.values() if is_distributable(blob.media_type)]

        async def send_blob(blob: Descriptor) -> None:
            ways[blob.key] = await to.blob(self._outgoing(blob))

        async def send(document: Document) -> None:
            ways[document.descriptor.key] = await to.manifest(document, document.descriptor.key)

        await _each(blobs, send_blob)
        last = found.documents[root.key]
        before = [document for document in found.documents.values() if document is not last]
        if any(document.content.subject for document in before):
            # What refers to it comes after it, and its tag after that.
            before = [*found.documents.values()]
        alone = [key for key, one in found.documents.items() if _stands_alone(one)]
        await _each([one for one in before if one.descriptor.key in alone], send)
        for document in before:
            if document.descriptor.key not in alone:
                await send(document)
        way = await to.manifest(last, self.reference.tag or root.key)
        ways.setdefault(root.key, way)
        sizes = {blob.key: blob.size for blob in blobs}
        sizes |= {key: document.descriptor.size for key, document in found.documents.items()}
        return Pushed(
            reference=self.reference,
            target=root,
            ways=ways,
            bytes_sent=sum(sizes[key] for key, way in ways.items() if way is Way.SENT),
            left_out=tuple(blob for blob in found.blobs.values() if blob not in blobs),
        )

    def _outgoing(self, blob: Descriptor) -> Outgoing:
        own = self.reference.path
        others = [path for path in self.elsewhere(blob) if path != own]
        return Outgoing(
            descriptor=blob,
            read=partial(self.read, blob),
            elsewhere=max(others, key=partial(_nearness, own), default=""),
            report=self.report,
        )


def _stands_alone(document: Document) -> bool:
    """Say whether it lists and refers to no other document."""
    return isinstance(document.content, Manifest) and not document.content.subject


def _nearness(own: str, other: str) -> int:
    """Return how many folders two repositories share: who may read one may rather read the other."""
    pairs = zip(own.split("/"), other.split("/"), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Work on several at once; the first error ends the work on all, and is raised."""
    left = iter(items)
    failed: list[EngineError] = []

    async def lane() -> None:
        for item in left:
            try:
                await work(item)
            except EngineError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()
                return

    async with trio.open_nursery() as nursery:
        for _ in range(limits.FETCHES_OF_IMAGE):
            nursery.start_soon(lane)
    if failed:
        raise failed[0]
