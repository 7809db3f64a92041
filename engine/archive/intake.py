"""Brings blobs from a source into the content store, and reads the documents among them.

Sync. Every byte is hashed on the way in. All is pinned by the caller's lease.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

from engine import labels, limits
from engine.archive.contents import blob_name, read_small
from engine.archive.source import Source
from engine.content.image import ResolvedImage
from engine.content.ingests import BeingWritten, ref_of
from engine.content.store import ContentStore
from engine.content.writer import Writer
from engine.errors import AlreadyExists, DigestMismatch, NotFound, Refused
from engine.fs.room import Room
from engine.kv.schema import Blob
from engine.oci.digest import Digest, digest_of, hasher
from engine.oci.documents import Descriptor
from engine.progress import Report, Step

__all__ = ["Absent", "Follower", "Intake", "Nobody"]


class Absent(NotFound):
    """A document that neither the source nor the store has; an image may do without."""


class Follower(Protocol):
    """Works on the layers of an image while they come in; what it raises ends that."""

    def following(self, image: ResolvedImage, /) -> AbstractContextManager[None]:
        """Follow the layers of an image, whose config is in the store, which the block brings in."""

    def tell(self, digest: Digest, number: int, there: int, /) -> None:
        """Hear how many bytes of a blob are durable, and under what number."""

    def come(self, digest: Digest, blob: Blob, /) -> None:
        """Hear that a blob is in the store."""


class Nobody:
    """Follows nothing."""

    def following(self, _image: ResolvedImage, /) -> AbstractContextManager[None]:
        """Let the block bring the layers in."""
        return nullcontext()

    def tell(self, _digest: Digest, _number: int, _there: int, /) -> None:
        """Take note of nothing."""

    def come(self, _digest: Digest, _blob: Blob, /) -> None:
        """Take note of nothing."""


class Intake:
    """One import's way into the store, with whom `follower` keeps up."""

    def __init__(
        self,
        source: Source,
        content: ContentStore,
        lease: str,
        report: Report,
        room: Room,
        follower: Follower,
    ) -> None:
        self.source = source
        self.lease = lease
        self.follower = follower
        self._content = content
        self._report = report
        self._room = room
        self._documents = 0
        self._layers: set[str] = set()

    # -- documents ----------------------------------------------------------------------------

    def small(self, name: str, limit: int) -> bytes:
        """Return a small file of the source whole; Refused once all have too many bytes together."""
        size = min(self.source.size(name) or 0, limit)  # no more is read
        if self._documents + size > limits.ARCHIVE_DOCUMENTS:
            raise Refused(
                f"the documents of all images have over {limits.ARCHIVE_DOCUMENTS} bytes; "
                "choose some with --ref"
            )
        self._documents += size
        self._report(Step.READ, "documents", self._documents, self._documents)
        return read_small(self.source, name, limit)

    def document(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a manifest, index or config from the source, verified, or from the store.

        Raises Absent if neither has it.
        """
        name = blob_name(descriptor.key)
        if self.source.size(name) is None:
            return self.stored(descriptor, limit)
        data = self.small(name, limit)
        _check_size(descriptor, len(data))
        running = hasher(descriptor.key)
        running.update(data)
        if running.hexdigest() != descriptor.key.partition(":")[2]:
            actual = f"{running.name}:{running.hexdigest()}"
            raise DigestMismatch(f"file {name}", descriptor.key, actual)
        return data

    def stored(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a document that is in the store, and pin it. Raises Absent."""
        try:
            self._content.info(descriptor.key, lease=self.lease)
            data = self._content.read_all(descriptor.key, limit)
        except NotFound:
            raise Absent(_absent(descriptor)) from None
        _check_size(descriptor, len(data))
        return data

    def check(self, descriptor: Descriptor) -> None:
        """Find out, before anything is copied, whether a blob can be had. Raises Refused.

        What only the store has is pinned: it shall still be there when its turn comes.
        """
        size = self.source.size(blob_name(descriptor.key))
        if size is None:
            try:
                size = self._content.info(descriptor.key, lease=self.lease).size
            except NotFound:
                raise Refused(_absent(descriptor)) from None
        _check_size(descriptor, size)

    # -- blobs --------------------------------------------------------------------------------

    def plan(self, digest: Digest, size: int) -> None:
        """Tell of a layer that is to come in; of documents only what they wait for is told."""
        self._layers.add(digest)
        self._show(Step.STORE, digest, size, 0)

    def _show(self, step: Step, digest: Digest | None, size: int, done: int) -> None:
        if digest in self._layers:
            self._report(step, str(digest), size, done)

    def store(self, descriptor: Descriptor, about: labels.Labels | None = None) -> None:
        """Bring one blob in by its digest, or pin the one that is here."""
        digest = descriptor.key
        try:
            writer = self.begin(ref_of(digest), digest, descriptor.size)
        except AlreadyExists:
            blob = self.found(digest)
            _check_size(descriptor, blob.size)
            self._merge_labels(digest, about)
            self.follower.come(digest, blob)
            return
        name = blob_name(digest)
        size = self.source.size(name)
        with writer:
            if size is None:
                writer.abort()
                raise Refused(_absent(descriptor))
            if size != descriptor.size:
                writer.abort()
                _check_size(descriptor, size)
            self.copy(name, writer, descriptor.size, digest)
            blob = self.kept(digest, writer.commit(about))
            self.follower.come(digest, blob)

    def put(self, data: bytes, media_type: str, about: labels.Labels) -> Descriptor:
        """Bring in a document that the source does not have as it stands, and return what it is."""
        digest = digest_of(data)
        try:
            with self.begin(ref_of(digest), digest, len(data)) as writer:
                for piece in _from_offset(iter((data,)), writer.offset):
                    writer.write(piece)
                writer.commit(about)
        except AlreadyExists:
            self._merge_labels(digest, about)
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    def found(self, digest: Digest) -> Blob:
        """Return the record of a blob that is here already."""
        blob = self._content.info(digest)
        for step in (Step.FOUND, Step.STORE):
            self._show(step, digest, blob.size, blob.size)
        return self.kept(digest, blob)

    def kept(self, item: Digest, blob: Blob) -> Blob:
        """Tell that what was brought in as `item` is in the store; return its record."""
        self._show(Step.KEEP, item, blob.size, blob.size)
        return blob

    def _merge_labels(self, digest: Digest, about: labels.Labels | None) -> None:
        if about:
            self._content.update(digest, about)

    def copy(self, name: str, writer: Writer, size: int, item: Digest) -> None:
        """Write what a writer has not got yet of a file."""
        show = partial(self._show, Step.STORE, item, size)
        self._show(Step.FOUND, item, size, writer.offset)
        show(writer.offset)
        self.follower.tell(item, *writer.durable)
        if writer.offset == size:  # all of it was there, or another namespace shares it
            return
        for piece in _from_offset(self.source.read(name), writer.offset):
            if growth := self._content.growth(len(piece)):
                self._room.take(growth)
            writer.write(piece)
            self.follower.tell(item, *writer.durable)
            show(writer.offset)

    def begin(self, ref: str, expected: Digest | None, size: int) -> Writer:
        """Open an ingest, after another import that has it open is done with it or dead."""
        waiting = ""
        try:
            while True:
                try:
                    return self._content.ingest(ref, lease=self.lease, expected=expected, total=size)
                except BeingWritten as error:
                    waiting = str(error)
                    self._waits(waiting, expected, size, 0)
                    self._content.wait(ref)
        finally:
            if waiting:
                self._waits(waiting, expected, size, size)

    def _waits(self, words: str, digest: Digest | None, size: int, done: int) -> None:
        self._report(Step.WAIT, words, size, done)
        self._show(Step.OTHER, digest, size, done)


def _absent(descriptor: Descriptor) -> str:
    return f"blob {descriptor.digest} is missing; the image is incomplete, copy it again"


def _check_size(descriptor: Descriptor, actual: int) -> None:
    if descriptor.size != actual:
        raise Refused(
            f"blob {descriptor.digest} has {actual} bytes, its descriptor says {descriptor.size}"
        )


def _from_offset(pieces: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """Leave out the first `offset` bytes, which an earlier writer stored and hashed."""
    for piece in pieces:
        if offset < len(piece):
            yield piece[offset:]
        offset = max(0, offset - len(piece))
