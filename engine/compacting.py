"""Makes the files of a store as small as what they hold, by copies; nobody else may have it open.

Sync.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.kv.copying import compact, compact_size
from engine.kv.environment import Environment
from engine.progress import Report, Step, silent
from engine.root import Root

__all__ = ["Compacted", "compact_store"]

_WORTH = 4 << 20  # bytes that a copy has to save


@dataclass(frozen=True, slots=True)
class Compacted:
    """One of the two files: its length, and what it takes up on the disk, before and after."""

    name: str
    size_before: int
    size_after: int
    disk_before: int
    disk_after: int


def compact_store(path: Path, report: Report = silent) -> list[Compacted]:
    """Copy each file of the store at `path` that has much to lose by it, one after the other.

    FailedPrecondition while others have the store open: it names them. ResourceExhausted where there
    is no room for a copy. What was done until then stays done.
    """
    with Root(path, create=False, alone=True) as root:
        return list(_compacted((root.meta, root.blobs), report))


def _compacted(environments: tuple[Environment, ...], report: Report) -> Iterator[Compacted]:
    for environment in environments:
        name, size = environment.path.name, compact_size(environment)
        before = (environment.path / "data.mdb").stat()
        if max(before.st_size, before.st_blocks * 512) - size >= _WORTH:
            compact(environment, partial(report, Step.COPY, name, size))
        after = (environment.path / "data.mdb").stat()
        yield Compacted(
            name=name,
            size_before=before.st_size,
            size_after=after.st_size,
            disk_before=before.st_blocks * 512,
            disk_after=after.st_blocks * 512,
        )
