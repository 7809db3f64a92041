"""Seals applied layers: settles them on what is below, makes them durable, and says so on disk.

Sync. The slow half of a commit, as a value that a worker process can carry out and be killed in: what
is left for `commit` is a record. Nothing here knows a key or a parent's name: a snapshot is a folder

    <id>/fs         the tree, or the layer of it
    <id>/outline    an applied layer's tree as a value, kept where it may be reused
    <id>/settling   there while, or since, the layer was settled only in part
    <id>/sealed     on what it was settled, and what it takes up; its data is durable when this is
                    there, or this says that it is not

Of a snapshot that was written through a mount nothing on disk says so: that may go on at any time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec

from engine.callables import named
from engine.diff import outline as outlines
from engine.diff.layer import dissolve
from engine.diff.outline import Outline
from engine.errors import DataLoss, EngineError, FailedPrecondition, os_errors
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.fs.durable import flush_file_system
from engine.fs.usage import measure
from engine.phases import Phase, measured
from engine.snapshots import Usage
from snapshotters.folder_sink import OUTLINE, TREE
from snapshotters.scanning import scan

__all__ = ["Seal", "Sealer", "Settle", "Settled", "Settlement", "Twin", "Unsettled", "load_sealed"]

_SETTLING, _SEALED = "settling", "sealed"


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """That a snapshot's data is settled on `parent`, and durable if it `is_flushed`.

    So is then what `notes` are about.
    """

    parent: str
    size: int
    inodes: int
    is_flushed: bool = True
    notes: int = 0
    folder: int = 0
    """Whose folder it has: its own, or that of another snapshot with the same layer."""
    marks: bytes = b""
    """What stands for all that settling came to, b"" where nobody can know."""
    asks: bytes = b""
    """What the layer asks of those below (`snapshotters.asking`), b"" where only its outline tells."""


@dataclass(frozen=True, slots=True)
class Twin:
    """The tree of the same layer, settled on something else."""

    tree: Path
    settled: Settled


@dataclass(frozen=True)
class Unsettled:
    """A layer to be settled: its tree, which is empty yet if there is a `twin`."""

    tree: Path
    twin: Twin | None

    @cached_property
    def outline(self) -> Outline:
        """The layer's tree as a value; large."""
        return _outline(self.twin.tree.parent if self.twin else self.tree.parent)


@dataclass(frozen=True, slots=True)
class Settlement:
    """A layer that is settled: what it takes up by itself, and as in `Settled`."""

    usage: Usage
    marks: bytes = b""
    asks: bytes = b""
    is_twin: bool = False
    """Whether that of its twin is its tree."""


class Settle(Protocol):
    """What a backend does to layers with outlines, on what is below them (nearest first)."""

    def __call__(self, below: Sequence[Path], layers: Iterable[Unsettled], /) -> Iterator[Settlement]:
        """Settle each on the one before it, in order.

        A layer is asked for when its turn comes: it may have been given up by then.
        """


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """Layers to seal: snapshot numbers below `folder`, each standing on the one before it.

    Without layers what was written so far is flushed, and no more.
    """

    settle: str
    """The name of what makes a `Settle`."""
    folder: str
    below: list[int] = []
    """What the first stands on, nearest first."""
    layers: list[int] = []
    twins: list[int] = []
    """For each the folder whose data it may have, 0 for none."""
    parents: list[str] = []
    """The names of what each layer is settled on, "" for none."""
    is_whole: bool = False
    """Whether there is one layer, and it is right as it is: written through a mount, or alone."""
    flush: bool = True
    """Whether the data of the layers is made durable, or left to the kernel."""
    notes: int = 0
    """What the flush covers of what was not flushed before (`MetaStore.unflushed`)."""


def load_sealed(snapshot: Path) -> Settled | None:
    """Return what the folder of a snapshot says of its sealing, None if it is not sealed."""
    try:
        return msgspec.msgpack.decode((snapshot / _SEALED).read_bytes(), type=Settled)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataLoss(f"{snapshot / _SEALED} cannot be read: {error}; remove the snapshot") from error


class Sealer:
    """Seals layers; kept by whoever seals many, as what is below stays the same for a while."""

    def __init__(self) -> None:
        self._settles: dict[str, Settle] = {}

    def __call__(self, argument: bytes) -> tuple[int, EngineError | None]:
        """Do what an encoded `Seal` says; return how many layers are sealed, and why not all are."""
        work = msgspec.msgpack.decode(argument, type=Seal)
        folder = Path(work.folder)
        if not work.layers:
            _flush(folder)
            return 0, None
        done: list[Settlement] = []
        failure: EngineError | None = None
        try:
            with os_errors(f"sealing a snapshot in {folder}"), measured(Phase.COMMIT):
                # One by one: what was settled before an error counts.
                for one in _whole(work, folder) if work.is_whole else self._settled(work, folder):
                    done.append(one)  # noqa: PERF402
        except EngineError as error:
            failure = error
        hit("snapshot.commit.settled")
        if done and work.flush:
            _flush(folder)
        hit("snapshot.commit.flushed")
        for parent, number, twin, one in zip(work.parents, work.layers, work.twins, done, strict=False):
            settled = Settled(
                parent=parent,
                size=one.usage.size,
                inodes=one.usage.inodes,
                folder=twin if one.is_twin else number,
                marks=one.marks,
                asks=one.asks,
                is_flushed=work.flush,
                notes=work.notes,
            )
            _mark(folder / str(number), settled)
        return len(done), failure

    def _settled(self, work: Seal, folder: Path) -> Iterator[Settlement]:
        if work.settle not in self._settles:
            self._settles[work.settle] = named(work.settle)()
        below = [folder / str(number) / TREE for number in work.below]
        snapshots = [
            (folder / str(number), folder / str(twin) if twin else None)
            for number, twin in zip(work.layers, work.twins, strict=True)
        ]
        settling = self._settles[work.settle](below, _begun(snapshots))
        try:
            yield from settling
        except BaseException:
            del self._settles[work.settle]  # what it remembers may be half of something
            raise


def _flush(folder: Path) -> None:
    with os_errors(f"snapshots in {folder}"), measured(Phase.FLUSH):
        flush_file_system(folder)


def _begun(snapshots: Sequence[tuple[Path, Path | None]]) -> Iterator[Unsettled]:
    """Yield each layer when its turn comes, one outline in memory at a time."""
    for snapshot, like in snapshots:
        mark = snapshot / _SETTLING
        if mark.exists():
            raise FailedPrecondition(f"a commit of {snapshot} failed halfway; remove it")
        layer = Unsettled(snapshot / TREE, _twin(like) if like else None)
        mark.touch()
        try:
            yield layer
        finally:
            if "outline" in vars(layer):
                dissolve(layer.outline.root)


def _mark(snapshot: Path, settled: Settled) -> None:
    with os_errors(f"snapshot {snapshot}"):
        fresh = snapshot / f"{_SEALED}.new"
        fresh.write_bytes(msgspec.msgpack.encode(settled))
        fresh.replace(snapshot / _SEALED)
        (snapshot / _SETTLING).unlink(missing_ok=True)


def _whole(work: Seal, folder: Path) -> Iterator[Settlement]:
    with folder_descriptor(folder / str(work.layers[0]) / TREE) as tree:
        yield Settlement(Usage(*measure(tree)))


def _twin(snapshot: Path) -> Twin:
    settled = load_sealed(snapshot)
    if settled is None or not (snapshot / OUTLINE).exists():
        raise DataLoss(f"the layer in {snapshot} cannot be reused any more; run the command again")
    return Twin(snapshot / TREE, settled)


def _outline(snapshot: Path) -> Outline:
    try:
        return outlines.decode((snapshot / OUTLINE).read_bytes())
    except FileNotFoundError:
        # Written to through a mount of its own: it hides nothing of what it is put on now.
        with folder_descriptor(snapshot / TREE) as tree:
            return scan(tree)
