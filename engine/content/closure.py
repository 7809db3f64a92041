"""All that a manifest or an index leads to, in the order in which a registry takes it.

Sync. Documents are read from wherever the caller says; they need not be of images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine import limits
from engine.content.image import Read
from engine.errors import NotFound, Refused
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor, Index, Manifest, parse_artifact, parse_index
from engine.oci.mediatypes import INDEXES, MANIFESTS

__all__ = ["Closure", "Document", "closure"]


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or an index: what it is, its bytes, and what they say."""

    descriptor: Descriptor
    data: bytes
    content: Manifest | Index


@dataclass(frozen=True, slots=True)
class Closure:
    """What a document leads to, itself included; each once."""

    documents: dict[Digest, Document] = field(default_factory=dict)
    """What each lists before itself, the root last."""
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: dict[Digest, Descriptor] = field(default_factory=dict)
    """Documents that are listed, and are not there."""


def closure(roots: Sequence[Descriptor], read: Read, found: Closure | None = None) -> Closure:
    """Return all that manifests and indexes lead to, added to what was `found` before, if given.

    NotFound if one is not there itself, Refused.
    """
    collector = _Collector(read, found or Closure())
    for root in roots:
        collector.collect(root, 0)
        if root.key in collector.found.missing:
            raise NotFound(f"no blob {root.digest}")
    return collector.found


class _Collector:
    def __init__(self, read: Read, found: Closure) -> None:
        self.found = found
        self._read = read
        self._bytes = sum(len(document.data) for document in found.documents.values())

    def collect(self, descriptor: Descriptor, depth: int) -> None:
        """Find a document and all that it leads to."""
        found = self.found
        if descriptor.key in found.documents or descriptor.key in found.missing:
            return
        if depth > limits.INDEX_DEPTH:
            raise Refused(f"manifest {descriptor.digest} is in over {limits.INDEX_DEPTH} indexes")
        try:
            data = self._read(descriptor, limits.MANIFEST)
        except NotFound:
            found.missing[descriptor.key] = descriptor
            return
        self._count(data)
        content = _parsed(descriptor, data)
        for child in _children(content):
            if child.media_type in INDEXES | MANIFESTS:
                self.collect(child, depth + 1)
            else:
                found.blobs.setdefault(child.key, child)
        if len(found.blobs) > limits.INDEX_BLOBS:
            raise Refused(f"an index leads to over {limits.INDEX_BLOBS} blobs")
        found.documents[descriptor.key] = Document(descriptor, data, content)

    def _count(self, data: bytes) -> None:
        self._bytes += len(data)
        count = len(self.found.documents) + len(self.found.missing)
        if count > limits.INDEX_ENTRIES or self._bytes > limits.DOCUMENTS:
            raise Refused(
                f"an index leads to over {limits.INDEX_ENTRIES} manifests, "
                f"or {limits.DOCUMENTS} bytes of them"
            )


def _parsed(descriptor: Descriptor, data: bytes) -> Manifest | Index:
    if descriptor.media_type in INDEXES:
        return parse_index(data, descriptor.media_type, f"index {descriptor.digest}")
    return parse_artifact(data, descriptor.media_type, f"manifest {descriptor.digest}")


def _children(content: Manifest | Index) -> Iterator[Descriptor]:
    if isinstance(content, Index):
        yield from content.manifests
    else:
        yield content.config
        yield from content.layers
