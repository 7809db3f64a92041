"""Holds every committed snapshot against its layer, or where that is not here against its own record.

Sync. Parents come before what stands on them: what a layer is on a parent that is damaged cannot be
told. With something that applies layers, what differs can be mended.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from engine import labels, plugins
from engine.content.store import ContentStore
from engine.diff.compare import Difference, compare_layer
from engine.errors import DataLoss, EngineError, NotFound, Refused
from engine.fsck.findings import Counts, Finding, Mend, Trouble, What
from engine.fsck.reapplying import Again, Apply, apply_again
from engine.fsck.records import Read, SnapshotKey
from engine.kv.schema import SNAPSHOTS, Blob, Snapshot
from engine.oci.digest import Digest, parse_digest
from engine.root import Root
from engine.snapshots import Kind, Snapshotter

__all__ = ["Snapshots"]

_NO_LAYER = "import or pull its image again, then repair"
_LOST = "what was written there is lost; `lamina snapshots rm` removes it"
_SHOWN = 3  # differences in one line


class _Footing(IntEnum):
    """What is known of the snapshots that one stands on; the worst of them counts."""

    WHOLE = 0
    UNKNOWN = 1
    """Some could be looked at by attributes only."""
    DAMAGED = 2


@dataclass(frozen=True, slots=True)
class Snapshots:
    """What is needed to look at the snapshots of a store."""

    root: Root
    read: Read
    counts: Counts
    passed: Callable[[int], None]
    """Told of bytes of packed layers as they are read."""
    broken: Collection[int]
    """Numbers of bytes that are not right."""
    apply: Apply | None
    only: Collection[SnapshotKey] | None = None
    right: Callable[[SnapshotKey], None] = lambda _key: None
    """Told of each with which nothing is wrong."""

    def check(self) -> Iterator[Trouble]:
        """Look at all snapshots, or `only` some."""
        children: defaultdict[SnapshotKey, list[SnapshotKey]] = defaultdict(list)
        for key, record in self.read.snapshots.items():
            children[*key[:2], record.parent].append(key)
        for backend, namespace in sorted({key[:2] for key in self.read.snapshots}):
            try:
                place = plugins.create(self.root, backend, namespace)
            except EngineError as error:
                detail = f"its snapshots are not looked at: {error}"
                about = Finding(
                    what=What.SNAPSHOT,
                    name="",
                    snapshotter=backend,
                    namespace=namespace,
                    detail=detail,
                    is_damage=False,
                )
                yield Trouble(about)
                continue
            # Whose parent is not here is told of already, and so is who stands on himself.
            pending = [(key, _Footing.WHOLE) for key in children[backend, namespace, ""]]
            while pending:
                key, footing = pending.pop()
                if self.only is None or key in self.only:
                    before = self.counts.by_attributes
                    trouble = self._trouble(place, key, footing)
                    if self.counts.by_attributes > before:
                        footing = max(footing, _Footing.UNKNOWN)
                    if trouble is None:
                        self.right(key)
                    else:
                        yield trouble
                        if trouble.finding.is_damage and not self._is_mended(key):
                            footing = _Footing.DAMAGED
                pending += [(child, footing) for child in children[key]]

    def _is_mended(self, key: SnapshotKey) -> bool:
        """Say whether a snapshot that was told of is another by now."""
        record = self._again(key)
        return record is None or record.id != self.read.snapshots[key].id

    def _again(self, key: SnapshotKey) -> Snapshot | None:
        with self.root.meta.read() as txn:
            return SNAPSHOTS.get(txn, *key)

    def _trouble(self, place: Snapshotter, key: SnapshotKey, footing: _Footing) -> Trouble | None:
        """Return what is wrong with a snapshot; None if nothing is, or it is gone by now."""
        record = self._again(key)
        if record is None or record.lease or record.id != self.read.snapshots[key].id:
            return None  # gone, being made, or already another
        self.counts.snapshots += 1
        layer = self._layer(key, record)
        try:
            trouble = self._look(place, key, record, layer, footing)
        except NotFound:  # itself, or what it stands on
            trouble = None
        # Whoever removes one takes the record first: then what was seen is no damage.
        again = self._again(key)
        return trouble if again is not None and again.id == record.id else None

    def _layer(self, key: SnapshotKey, record: Snapshot) -> Blob | None:
        """Return the blob of a snapshot's layer, None where it is not here or not right."""
        namespace = key[1]
        diff_id = record.labels.get(labels.DIFF_ID, "")
        content = ContentStore(self.root.meta, self.root.blobs, namespace)
        for digest in self.read.layers.get((namespace, diff_id), ()):
            try:
                blob = content.info(Digest(digest))
            except (NotFound, DataLoss):
                continue
            if blob.number not in self.broken:
                return blob
        return None

    def _look(
        self,
        place: Snapshotter,
        key: SnapshotKey,
        record: Snapshot,
        layer: Blob | None,
        footing: _Footing,
    ) -> Trouble | None:
        if record.kind != Kind.COMMITTED or layer is None:
            return self._by_attributes(place, key, record)
        mend = self._mend(place, key, record, layer)
        if footing is _Footing.DAMAGED:
            mend = None  # made anew, it would be made on that
        try:
            found = self._compare(place, key, record, layer)
        except DataLoss as error:
            return _told(key, str(error), mend)
        except Refused as error:
            return _told(key, f"it cannot be held against its layer: {error}", is_damage=False)
        by_below = [one for one in found if one.by_below]
        if by_below and footing is _Footing.DAMAGED:
            found = [one for one in found if not one.by_below]
            if not found:
                return _told(
                    key, "it can be told only once what it stands on is mended", is_damage=False
                )
        elif by_below and footing is _Footing.UNKNOWN:
            # Which of the two is wrong nobody can tell.
            detail = f"{_summary(found)}; the layer of what it stands on is not here"
            return _told(key, detail, differences=found)
        return _told(key, _summary(found), mend, differences=found) if found else None

    def _compare(
        self, place: Snapshotter, key: SnapshotKey, record: Snapshot, layer: Blob
    ) -> Sequence[Difference]:
        diff_id = parse_digest(record.labels[labels.DIFF_ID])
        content = ContentStore(self.root.meta, self.root.blobs, key[1])
        before = 0

        def progress(read: int) -> None:
            nonlocal before
            self.passed(read - before)
            before = read

        packed = content.read(Digest(layer.digest))
        came = compare_layer(packed, place.comparing(key[2]), diff_id=diff_id, progress=progress)
        self.counts.snapshot_bytes += came.bytes_unpacked
        if came.diff_id != diff_id:
            raise Refused(f"blob {layer.digest} holds another layer")
        return came.differences

    def _by_attributes(self, place: Snapshotter, key: SnapshotKey, record: Snapshot) -> Trouble | None:
        """Look at a snapshot whose layer nobody has: that it is there, and as large as it was."""
        is_layer = record.kind == Kind.COMMITTED
        try:
            usage = place.measure(key[2])
        except DataLoss as error:
            return _told(key, f"{error}; {_NO_LAYER if is_layer else _LOST}")
        if not is_layer:
            return None  # as many files as someone likes
        self.counts.by_attributes += 1
        if usage.inodes != record.inodes:
            wrong = f"it has {usage.inodes} files and folders, not {record.inodes}"
            return _told(key, f"{wrong}; {_NO_LAYER}")
        return _told(key, "its layer is not here: checked by attributes only", is_damage=False)

    def _mend(self, place: Snapshotter, key: SnapshotKey, record: Snapshot, layer: Blob) -> Mend | None:
        if self.apply is None:
            return None
        again = Again(root=self.root, namespace=key[1], place=place, record=record, layer=layer)
        return partial(apply_again, again, self.apply)


def _summary(differences: Sequence[Difference]) -> str:
    shown = "; ".join(
        f"/{one.path} {one.how}" + (f" ({one.detail})" if one.detail else "")
        for one in differences[:_SHOWN]
    )
    more = len(differences) - _SHOWN
    return shown + (f"; and {more} more" if more > 0 else "")


def _told(
    key: SnapshotKey,
    detail: str,
    mend: Mend | None = None,
    *,
    differences: Sequence[Difference] = (),
    is_damage: bool = True,
) -> Trouble:
    backend, namespace, name = key
    finding = Finding(
        what=What.SNAPSHOT,
        name=name,
        namespace=namespace,
        snapshotter=backend,
        detail=detail,
        differences=tuple(differences),
        is_damage=is_damage,
    )
    return Trouble(finding, mend)
