"""Every manifest that a descriptor leads to: of all platforms, and what an index says about them.

Sync. Attestations and artifacts are among them; what is neither a manifest nor an index is not.
"""

from collections.abc import Iterator, Sequence

from engine import limits
from engine.content.image import Read
from engine.errors import Refused
from engine.oci.documents import Descriptor, Manifest, parse_artifact, parse_index
from engine.oci.mediatypes import INDEXES, MANIFESTS

__all__ = ["manifests"]


def manifests(target: Descriptor, read: Read) -> Iterator[tuple[Sequence[Descriptor], Manifest]]:
    """Yield the way to each manifest, `target` first, and what it says; each is read once.

    Raises Refused for documents that break a rule or are too many, and what `read` does.
    """
    seen: set[str] = set()
    indexes = 0
    pending: list[tuple[Descriptor, ...]] = [(target,)]
    while pending:
        path = pending.pop()
        last = path[-1]
        if last.digest in seen or last.media_type not in MANIFESTS | INDEXES:
            continue
        seen.add(last.digest)
        data = read(last, limits.MANIFEST)
        if last.media_type in MANIFESTS:
            yield path, parse_artifact(data, last.media_type, f"manifest {last.digest}")
            continue
        indexes += 1
        entries = parse_index(data, last.media_type, f"index {last.digest}").manifests
        pending += [(*path, entry) for entry in reversed(entries)]
        too_many = indexes > limits.INDEXES or len(seen) + len(pending) > limits.INDEX_ENTRIES
        if too_many or len(path) > limits.INDEX_DEPTH:
            raise Refused(
                f"index {target.digest} leads to over {limits.INDEX_ENTRIES} manifests, "
                f"{limits.INDEXES} indexes or {limits.INDEX_DEPTH} levels"
            )
