"""Holds what media types say of layers against their bytes. Sync."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from engine.content.image import Layer
from engine.content.store import ContentStore
from engine.diff.decompress import SNIFFED, sniff
from engine.errors import DataLoss, NotFound, Refused
from engine.oci.mediatypes import Compression

__all__ = ["mistyped"]


def mistyped(layers: Iterable[Layer], content: ContentStore, *, strict: bool) -> tuple[str, ...]:
    """Return a line for each layer whose bytes are packed in another way than its media type says.

    With `strict` Refused for the first. What cannot be read is passed over: whoever needs the layer
    finds that out.
    """
    odd = tuple(_mistyped(layers, content))
    if odd and strict:
        raise Refused(f"{odd[0]}; without --strict the bytes decide")
    return odd


def _mistyped(layers: Iterable[Layer], content: ContentStore) -> Iterator[str]:
    for layer in layers:
        digest, promised = layer.descriptor.key, layer.compression
        with suppress(NotFound, DataLoss):
            found = sniff(content.head(digest, SNIFFED))
            if promised not in {Compression.ANY, found}:
                yield f"layer {digest}: packed with {found} by its bytes, {promised} by its media type"
