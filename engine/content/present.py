"""Which of the images that a name stands for are in the store: an index lists many platforms.

Sync.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from engine import limits
from engine.content.image import Read, ResolvedImage, may_be_image, resolve
from engine.errors import Refused
from engine.oci.documents import Descriptor, NotAnImage, parse_index
from engine.oci.mediatypes import INDEXES
from engine.oci.platform import Platform, choose

__all__ = ["present"]

_Path = tuple[Descriptor, ...]


def present(
    target: Descriptor, platform: Platform, read: Read, is_here: Callable[[Descriptor], bool]
) -> list[ResolvedImage]:
    """Return the images of `target` whose manifests are here, the best for `platform` first.

    What an index lists beside images is none of them. Raises Refused for documents that break a rule,
    or are too many, NotFound for a config that is not here.
    """
    found: list[ResolvedImage] = []
    read_bytes = 0

    def reading(descriptor: Descriptor, limit: int) -> bytes:
        nonlocal read_bytes
        data = read(descriptor, limit)
        # Each time: many manifests may have one config, which is parsed for each.
        read_bytes += len(data)
        if read_bytes > limits.DOCUMENTS:
            raise Refused(f"{target.digest} leads to over {limits.DOCUMENTS} bytes of documents")
        return data

    for path in _paths((target,), reading, is_here, set()):
        try:
            found.append(replace(resolve(path[-1], platform, reading), path=path))
        except NotAnImage:
            if len(path) == 1:
                raise
    best = choose(platform, [image.config.platform for image in found])
    if best:
        found.insert(0, found.pop(best))
    return found


def _paths(
    path: _Path, read: Read, is_here: Callable[[Descriptor], bool], seen: set[str]
) -> Iterator[_Path]:
    """Yield how each manifest that is here is reached, whatever else leads to it."""
    last = path[-1]
    if last.digest in seen:
        return
    seen.add(last.digest)
    if last.media_type not in INDEXES:
        yield path
    elif len(path) <= limits.INDEX_DEPTH:
        for entry in parse_index(read(last, limits.MANIFEST), last.media_type).manifests:
            if may_be_image(entry) and is_here(entry):
                yield from _paths((*path, entry), read, is_here, seen)
