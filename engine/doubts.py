"""Checks what was committed without being flushed before the machine went down, before anyone uses it.

Sync. Who opens the store to write does it, and whoever else opens it meanwhile waits for that: until a
snapshot is checked it is not served (`engine.metadata.unflushed`). Held against its layer,

    right               the note goes
    damaged             applied again from the layer's blob
    not to be mended    removed, with what stands on it, if nobody uses any of it; else told, and kept

What cannot be mended now (a full disk) waits for the next, as does what is left by who dies meanwhile.
Nothing is doubted that was flushed since it was committed: by a later commit, by a collection, by who
opens the store a while after.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial

from engine import plugins
from engine.errors import DataLoss, EngineError, FailedPrecondition, Refused, os_errors
from engine.failpoints import hit
from engine.fs.locks import holders, lock, named
from engine.fsck.findings import Counts, Trouble
from engine.fsck.records import Read, SnapshotKey, read_records
from engine.fsck.snapshots import Snapshots
from engine.gc.holding import stands
from engine.kv.schema import SNAPSHOTS, Unflushed, now
from engine.metadata import unflushed
from engine.metadata.nodes import snapshot_node
from engine.root import Root
from engine.snapshots import Kind
from engine.unpack.apart import apply_apart

__all__ = ["flush_waiting", "settle_doubts"]

_log = logging.getLogger(__name__)
_POLL_S = 0.1  # who has the lock cannot tell us that he is done


def flush_waiting(root: Root, *, after_s: float) -> None:
    """Flush what was committed without that, of backends for which the last such is so long ago.

    By then the kernel has written nearly all of it.
    """
    for backend, at in unflushed.waiting(root.meta).items():
        if now() - at >= after_s * 10**9:
            plugins.create(root, backend, "default").flush()


def settle_doubts(root: Root, passed: Callable[[], None]) -> None:
    """Check what the machine going down has put in doubt; `passed` is called often, and may end it."""
    if not unflushed.doubted(root.meta):
        return
    with _alone(root, passed):
        if notes := unflushed.doubted(root.meta):  # another may have been first
            _settle(root, notes, passed)


@contextmanager
def _alone(root: Root, passed: Callable[[], None]) -> Iterator[None]:
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os_errors(f"root {root.path}"):
        file = os.open(root.path / "recovery", flags, 0o600)
    try:
        if not lock(file, alone=True):
            _log.warning("waiting for %s, which puts the store in order", named(holders(file)))
            while not lock(file, alone=True):
                passed()
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(file)


def _settle(root: Root, notes: list[tuple[str, Unflushed]], passed: Callable[[], None]) -> None:
    _log.warning(
        "checking %s that the machine went down before flushing",
        f"{len(notes)} snapshots" if len(notes) > 1 else "a snapshot",
    )
    counts = Counts()
    read = read_records(root.meta, counts)
    about = {key: (backend, note) for backend, note in notes for key in _having(read, backend, note)}
    snapshots = Snapshots(
        root=root,
        read=read,
        counts=counts,
        passed=lambda _size: passed(),
        broken=(),
        apply=lambda job: apply_apart(job, passed),
        only=about,
        right=lambda key: unflushed.forget(root.meta, [about[key]]),
    )
    lost = _lost(read, snapshots.check())
    hit("doubts.checked")
    gone: set[SnapshotKey] = set()
    for key in lost:
        if key not in gone:
            gone |= _dropped(root, read, key)
    hit("doubts.dropped")
    unflushed.forget(root.meta, [one for one in notes if _is_gone(root, read, *one)])


def _lost(read: Read, troubles: Iterable[Trouble]) -> list[SnapshotKey]:
    """Mend what is wrong; return what cannot be mended, but for what waits with one below it."""
    lost: list[SnapshotKey] = []
    waiting: set[SnapshotKey] = set()
    for trouble in troubles:
        key = (trouble.finding.snapshotter, trouble.finding.namespace, trouble.finding.name)
        if not key[2]:
            continue  # of a backend that cannot be loaded
        below = (*key[:2], read.snapshots[key].parent)
        fate = _mended(trouble)
        if fate is _Fate.WAITS or (fate is _Fate.LOST and below in waiting):
            waiting.add(key)
        elif fate is _Fate.LOST:
            lost.append(key)
    return lost


class _Fate(Enum):
    """What becomes of a snapshot that is not right."""

    MENDED = auto()
    WAITS = auto()
    """It cannot be mended now."""
    LOST = auto()


def _mended(trouble: Trouble) -> _Fate:
    """Mend what is wrong with a snapshot, if that can be."""
    found = trouble.finding
    told = partial(_log.warning, "snapshot %s of %s: %s", found.name, found.snapshotter)
    why = found.detail
    if trouble.mend is not None:
        try:
            told(trouble.mend())
            hit("doubts.mended")
            return _Fate.MENDED
        except (DataLoss, Refused) as error:  # of the blob, whose digest may tell
            why = f"{why}; it cannot be applied again: {error}"
        except EngineError as error:
            told(f"{why}; it cannot be applied again now, and is not used: {error}")
            return _Fate.WAITS
    told(why)
    return _Fate.LOST


def _dropped(root: Root, read: Read, key: SnapshotKey) -> set[SnapshotKey]:
    """Remove a snapshot and what stands on it, unless somebody uses it; return what is gone."""
    backend, namespace, name = key
    standing = _standing_on(read, key)
    try:
        place = plugins.create(root, backend, namespace)
        for one in standing:
            _check_unused(root, read, one)
        place.cleanup(only=[place.remove(one[2]) for one in reversed(standing)])
    except EngineError as error:
        advice = "once its layer is here again, `lamina fsck --repair` mends it"
        _log.warning("snapshot %s of %s stays, and is not used: %s; %s", name, backend, error, advice)
        return set()
    _log.warning("snapshot %s of %s: removed; unpack its image again", name, backend)
    return set(standing)


def _standing_on(read: Read, key: SnapshotKey) -> list[SnapshotKey]:
    """Return a snapshot and all that stands on it, each after what it stands on."""
    found = [key]
    for backend, namespace, name in found:
        found += [
            other
            for other, record in read.snapshots.items()
            if (*other[:2], record.parent) == (backend, namespace, name)
        ]
    return found


def _check_unused(root: Root, read: Read, key: SnapshotKey) -> None:
    """Raise FailedPrecondition for what is no layer, but for work of who is dead."""
    if read.snapshots[key].kind != Kind.COMMITTED:
        backend, namespace, name = key
        with root.meta.read() as txn:
            if stands(root.owners, txn, namespace, snapshot_node(backend, name)):
                raise FailedPrecondition(f"snapshot {name} stands on it")


def _having(read: Read, backend: str, note: Unflushed) -> Iterator[SnapshotKey]:
    """Yield the snapshots that have the folder of a note: those of one layer may share it."""
    for key, record in read.snapshots.items():
        if (key[0], record.id) == (backend, note.id):
            yield key


def _is_gone(root: Root, read: Read, backend: str, note: Unflushed) -> bool:
    """Say whether all that a note is about has another folder by now, or none."""
    with root.meta.read() as txn:
        records = [SNAPSHOTS.get(txn, *key) for key in _having(read, backend, note)]
    return all(record is None or record.id != note.id for record in records)
