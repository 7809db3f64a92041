"""Reads every record of a store, and holds each against itself and against what it names.

Sync. All records are read from one view, so that what others write meanwhile makes none look wrong. What
a record stands for, bytes and folders, is for others to look at.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine import labels
from engine.errors import DataLoss
from engine.fsck.findings import Counts, Finding, Mend, Trouble, What
from engine.fsck.record_mends import (
    IsUsed,
    drop_items,
    drop_note,
    drop_trash,
    end_mark,
    raise_counter,
    rebuild,
    spare,
)
from engine.kv import keys
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import (
    BLOBS,
    CONTAINERS,
    COUNTERS,
    HOLDINGS,
    IMAGES,
    INGESTS,
    KIN,
    LAYERS,
    LEASE_ITEMS,
    LEASES,
    MARKS,
    MENTIONS,
    MOUNTS,
    NAMESPACES,
    SNAPSHOTS,
    TOUCHED,
    TRASH,
    UNFLUSHED,
    Blob,
    Image,
    Ingest,
    Lease,
    LeaseItem,
    MountRecord,
    Snapshot,
    Trash,
)
from engine.kv.table import Damaged, Table
from engine.metadata import ledger
from engine.metadata.nodes import (
    INGEST,
    LEASE,
    MEMBER,
    PARENT,
    TARGET,
    Mention,
    Node,
    Object,
    mentions,
    node_of,
    snapshot_node,
    token,
)
from engine.snapshots import Kind

__all__ = ["Read", "SnapshotKey", "read_records"]

SnapshotKey = tuple[str, str, str]
"""Backend, namespace and key of a snapshot."""

_TABLES: tuple[Table[Any], ...] = (
    SNAPSHOTS,  # first: they say which layers are looked for
    BLOBS,
    IMAGES,
    INGESTS,
    LEASES,
    LEASE_ITEMS,
    MOUNTS,
    CONTAINERS,
    KIN,
    NAMESPACES,
    MARKS,
    TOUCHED,
    TRASH,
    UNFLUSHED,
)
_KINDS = {str(kind) for kind in Kind}
_NAMING = {table.name for table in (SNAPSHOTS, BLOBS, IMAGES, INGESTS, LEASES, LEASE_ITEMS)}
_RELEASE_EVERY = 10_000  # records read between two calls that give the memory of their pages back


@dataclass
class Read:
    """What the records say, as far as others have to know, and what is wrong with them."""

    troubles: list[Trouble] = field(default_factory=list)
    numbers: dict[int, str] = field(default_factory=dict)
    """Numbers of bytes: the digest of a blob, "" of what is on its way in or out."""
    snapshots: dict[SnapshotKey, Snapshot] = field(default_factory=dict)
    ids: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """By backend, what snapshots there are, those among it that wait to be deleted."""
    layers: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """By namespace and diff ID the blobs, packed somehow, of the layers of snapshots."""
    torn: set[str] = field(default_factory=set)
    """Backends that have snapshots without their parents, whose folders may be there."""
    blob_bytes: int = 0
    is_readable: bool = True
    """Whether every record that names bytes or folders can be: else nobody knows what is an orphan."""


def read_records(meta: Environment, counts: Counts) -> Read:
    """Read all records of a store."""
    with meta.read() as txn:
        reading = _Reading(meta, txn, counts)
        reading.run()
        return reading.read


class _Reading:
    def __init__(self, meta: Environment, txn: Transaction, counts: Counts) -> None:
        self._meta = meta
        self._txn = txn
        self._counts = counts
        self.read = Read()
        self._dead: list[Trash] = []
        self._mentions = 0
        self._holdings = 0
        self._layers = 0
        self._laid: dict[tuple[str, int], tuple[str, str]] = {}  # folders: namespace and layer
        self._is_whole = True  # as long as every record can be read
        self._not_noted = 0
        self._first_not_noted = ""

    def run(self) -> None:
        for table in _TABLES:
            for names, record in table.entries(self._txn):
                self._counts.records += 1
                if self._counts.records % _RELEASE_EVERY == 0:
                    self._meta.release_pages()
                if isinstance(record, Damaged):
                    self._unreadable(table.name, names, record)
                else:
                    self._take(names, record)
        self._snapshots()
        self._trash()
        self._counters()
        self._check_derived()

    def _tell(
        self,
        what: What,
        name: str,
        detail: str,
        *,
        namespace: str = "",
        snapshotter: str = "",
        is_damage: bool = True,
        mend: Mend | None = None,
    ) -> None:
        finding = Finding(
            what=what,
            name=name,
            namespace=namespace,
            snapshotter=snapshotter,
            detail=detail,
            is_damage=is_damage,
        )
        self.read.troubles.append(Trouble(finding, mend))

    def _unreadable(self, table: str, names: list[str], record: Damaged) -> None:
        if table in _NAMING:
            self._is_whole = False
        if table in {BLOBS.name, INGESTS.name, SNAPSHOTS.name, TRASH.name}:
            self.read.is_readable = False
        namespace, backend, mend = names[0], "", None
        if table == SNAPSHOTS.name:
            backend, namespace = names[:2]
        elif table == TRASH.name:
            backend, namespace = names[1], ""
            mend = partial(drop_trash, self._meta, names[0], backend)
        elif table == UNFLUSHED.name:
            backend, namespace = namespace, ""
            mend = partial(drop_note, self._meta, backend)
        elif table in {MARKS.name, TOUCHED.name}:
            mend = partial(end_mark, self._meta, namespace)
        elif table == LEASE_ITEMS.name and not self._is_there(namespace, Node(LEASE, "", names[1])):
            mend = partial(drop_items, self._meta, namespace, names[1])
        self._tell(
            What.RECORD, record.name, record.error, namespace=namespace, snapshotter=backend, mend=mend
        )

    def _take(self, names: list[str], record: object) -> None:
        match record:
            case Blob() | Image() | Ingest() | Lease():
                if self._is_named(names, names[0], node_of(record), record):
                    self._object(names[0], node_of(record), record)
            case Snapshot():
                backend, namespace = names[:2]
                node = snapshot_node(backend, record.key)
                if not self._is_named(names, namespace, node, record):
                    return
                self._object(namespace, node, record)
                self.read.snapshots[backend, namespace, record.key] = record
                if labels.DIFF_ID in record.labels:
                    self.read.layers.setdefault((namespace, record.labels[labels.DIFF_ID]), [])
                self._number(record, backend, namespace)
                self._layer(record, backend, namespace)
            case LeaseItem():
                namespace, lease = names[:2]
                member = Node(record.kind, record.backend, record.key)
                self._mention(namespace, Node(LEASE, "", lease), Mention(MEMBER, member))
                if not self._is_there(namespace, Node(LEASE, "", lease)):
                    detail = f"belongs to lease {lease}, which is not here"
                    mend = partial(drop_items, self._meta, namespace, lease)
                    self._tell(
                        What.EDGE, record.key, detail, namespace=namespace, is_damage=False, mend=mend
                    )
            case Trash():
                self._dead.append(record)
            case MountRecord():
                if SNAPSHOTS.get(self._txn, record.backend, names[0], record.key) is None:
                    detail = "its snapshot is gone; `lamina gc` clears it"
                    self._tell(What.MOUNT, record.key, detail, namespace=names[0], is_damage=False)

    def _number(self, record: Snapshot, backend: str, namespace: str) -> None:
        layer = (namespace, record.diff_id)
        if self._laid.setdefault((backend, record.id), layer) != layer or (
            not record.diff_id and record.id in self.read.ids[backend]
        ):
            detail = f"another snapshot has its folder {record.id} too"
            self._tell(What.SNAPSHOT, record.key, detail, namespace=namespace, snapshotter=backend)
        self.read.ids[backend].update(record.folders)

    def _is_named(self, names: list[str], namespace: str, node: Node, record: Object) -> bool:
        """Say whether a record stands under its own name; a long one the key does not tell."""
        is_long = len(node.key.encode()) > keys.LONGEST
        if ledger.get(self._txn, namespace, node) == record and (is_long or names[-1] == node.key):
            return True
        self.read.is_readable = self._is_whole = False
        detail = f"it is stored under another name, {names[-1]}"
        self._tell(What.RECORD, node.key, detail, namespace=namespace)
        return False

    def _object(self, namespace: str, node: Node, record: Object) -> None:
        for mention in set(mentions(node, record)):
            self._mention(namespace, node, mention)
        if isinstance(record, Blob):
            if record.number not in self.read.numbers:
                self.read.blob_bytes += record.size
            self._bytes(record.number, record.digest, namespace)
            diff_id = record.labels.get(labels.UNCOMPRESSED, record.digest)
            if (layers := self.read.layers.get((namespace, diff_id))) is not None:
                layers.append(record.digest)
            self._holding(namespace, record)
        elif isinstance(record, Ingest):
            self._bytes(record.number, "", namespace)

    def _bytes(self, number: int, digest: str, namespace: str) -> None:
        other = self.read.numbers.setdefault(number, digest)
        if other != digest:  # the same blob in two namespaces shares its bytes
            detail = f"its bytes {number} are also those of {other or 'what is being written'}"
            self._tell(What.BLOB, digest or str(number), detail, namespace=namespace)

    # -- what follows from the records ----------------------------------------------------------

    def _mention(self, namespace: str, node: Node, mention: Mention) -> None:
        self._mentions += 1
        key = (namespace, token(mention.node), mention.how, token(node))
        try:
            found = MENTIONS.get(self._txn, *key)
        except DataLoss:
            found = None
        if found is None or Node(found.kind, found.backend, found.key) != node:
            self._miss(f"that {node.key} names {mention.node.key}")
        # What an ingest expects is not here yet; a parent or target that is not here is told of later.
        is_awaited = node.kind == INGEST or mention.how in {PARENT, TARGET}
        if not is_awaited and not self._is_there(namespace, mention.node):
            detail = f"names {mention.node.key}, which is not here"
            self._tell(What.EDGE, node.key, detail, namespace=namespace, is_damage=False)

    def _is_there(self, namespace: str, node: Node) -> bool:
        try:
            return ledger.get(self._txn, namespace, node) is not None
        except DataLoss:
            return True
        except KeyError:  # a kind that only containerd's leases have
            return True

    def _holding(self, namespace: str, blob: Blob) -> None:
        if namespace == ledger.HOME:
            return
        self._holdings += 1
        try:
            found = HOLDINGS.get(self._txn, blob.digest, namespace)
        except DataLoss:
            found = None
        if found is None or (found.namespace, found.number) != (namespace, blob.number):
            self._miss(f"whose the bytes of {blob.digest} are")

    def _layer(self, record: Snapshot, backend: str, namespace: str) -> None:
        if not record.diff_id:
            return
        self._layers += 1
        node = snapshot_node(backend, record.key)
        try:
            is_noted = node in ledger.sharers(self._txn, namespace, node, record)
        except DataLoss:
            is_noted = False
        if not is_noted:
            self._miss(f"in whose folder the layer of {record.key} is")

    def _miss(self, what: str, count: int = 1) -> None:
        self._first_not_noted = self._first_not_noted or what
        self._not_noted += count

    def _check_derived(self) -> None:
        """See that what follows from the records is there, and nothing else."""
        for name, count, wanted in (
            (MENTIONS.name, MENTIONS.count(self._txn), self._mentions),
            (HOLDINGS.name, HOLDINGS.count(self._txn), self._holdings),
            (LAYERS.name, LAYERS.count(self._txn), self._layers),
        ):
            if count > wanted and self._is_whole:
                self._miss(f"{count - wanted} {name} that no record has", count - wanted)
        if self._not_noted:
            detail = f"it is not noted right {self._first_not_noted}"
            detail += f", and {self._not_noted - 1} more" if self._not_noted > 1 else ""
            # What a record that cannot be read names is noted nowhere else.
            mend = partial(rebuild, self._meta) if self._is_whole else None
            self._tell(What.EDGE, "mentions", detail, mend=mend)

    # -- lineage, trash, counters ---------------------------------------------------------------

    def _snapshots(self) -> None:
        whole: set[SnapshotKey] = set()
        for key, record in self.read.snapshots.items():
            wrong = self._wrong_with(key, record)
            backend, namespace, name = key
            if wrong:
                self.read.torn.add(backend)
            elif self._is_in_circle(key, whole):
                wrong = "it stands on itself, in a circle"
            if wrong:
                self._tell(What.SNAPSHOT, name, wrong, namespace=namespace, snapshotter=backend)

    def _wrong_with(self, key: SnapshotKey, record: Snapshot) -> str:
        backend, namespace, _ = key
        if record.kind not in _KINDS:
            return f"it is of no kind that there is: {record.kind!r}"
        parent = self.read.snapshots.get((backend, namespace, record.parent))
        if record.parent and parent is None:
            return f"its parent {record.parent} is not here; remove it, then unpack its image again"
        if parent is not None and parent.kind != Kind.COMMITTED:
            return f"its parent {record.parent} is {parent.kind}, not committed"
        return ""

    def _is_in_circle(self, key: SnapshotKey, whole: set[SnapshotKey]) -> bool:
        way: dict[SnapshotKey, None] = {}
        at: SnapshotKey | None = key
        while at is not None and at not in whole:
            if at in way:
                return True
            way[at] = None
            record = self.read.snapshots.get(at)
            at = (*at[:2], record.parent) if record and record.parent else None
        whole.update(way)
        return False

    def _trash(self) -> None:
        for dead in self._dead:
            if dead.kind == "blob":
                is_live = dead.number in self.read.numbers
                self.read.numbers.setdefault(dead.number, "")
            else:
                is_live = dead.number in self.read.ids[dead.backend]
                self.read.ids[dead.backend].add(dead.number)
            if is_live:
                name = f"{dead.kind} {dead.number}"
                mend = partial(spare, self._meta, dead, self._user_of(dead))
                self._tell(What.TRASH, name, "it would be deleted, and a record has it", mend=mend)

    def _user_of(self, dead: Trash) -> IsUsed:
        """Return what says, in a later transaction, whether something still has what is dead."""
        if dead.kind == "blob":
            digest = self.read.numbers[dead.number]
            return lambda txn: any(held.number == dead.number for held in ledger.holdings(txn, digest))
        keys = [
            key
            for key, record in self.read.snapshots.items()
            if key[0] == dead.backend and dead.number in record.folders
        ]
        return lambda txn: any(
            (found := SNAPSHOTS.get(txn, *key)) is not None and dead.number in found.folders
            for key in keys
        )

    def _counters(self) -> None:
        highest = {
            "blob": max(self.read.numbers, default=0),
            "snapshot": max((n for ids in self.read.ids.values() for n in ids), default=0),
        }
        for sequence, number in highest.items():
            try:
                last = COUNTERS.last(self._txn, sequence)
            except DataLoss:
                last = -1
            if last < number and self.read.is_readable:
                detail = f"it is at {max(last, 0)}, and {number} is in use"
                mend = partial(raise_counter, self._meta, sequence, number)
                self._tell(What.COUNTER, sequence, detail, mend=mend)
