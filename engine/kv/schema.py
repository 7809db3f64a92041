"""Every table of a store and what is in it: the one place that draws `meta.lmdb`.

Sync (it reads the clock). Keys are composite (`keys`); NS is the namespace.

    table         key                        record       written by
    blobs         NS digest                  Blob         metadata.ledger, for content
    small         number                     Small        content: bytes of small blobs
    ingests       NS ref                     Ingest       metadata.ledger, for content
    images        NS name                    Image        metadata.ledger, for metadata.images
    leases        NS id                      Lease        metadata.ledger, for metadata.leases
    lease_items   NS lease kind backend key  LeaseItem    metadata.ledger: whoever makes or finds it
    snapshots     backend NS key             Snapshot     metadata.ledger, for metadata.lineage
    mentions      NS token how token         Mentioned    metadata.ledger: who mentions what
    holdings      digest NS                  Holding      metadata.ledger: whose bytes, but for "default"
    layers        backend NS diff ID folder token
                                             LayerFolder  metadata.ledger: whose folder has a layer
    touched       NS token                   Touched      metadata.ledger, while a mark is under way
    marks         NS                         Mark         metadata.marks
    namespaces    NS                         Namespace    metadata.namespaces
    mounts        NS key                     MountRecord  metadata.mounts, .provisions
    containers    NS id                      Container    metadata.containers, .provisions
    kin           NS parent child            Kin          metadata.containers: whose children there are
    clocks        "last"                     Clock        gc.clock
    unflushed     backend id                 Unflushed    metadata.unflushed
    trash         kind backend number        Trash        whoever drops the record of bytes
    counters      sequence                   a number     blob numbers, snapshot ids

A token stands for a node (`metadata.nodes`). Under the token of what is mentioned `mentions` has whoever
mentions it, so that who holds one thing is found without reading all others.

`small` has the bytes of blobs of up to INLINE bytes, so that one transaction makes such a blob; not of
all, as what was begun without knowing the size has its bytes where the others have theirs: `blobs.lmdb`
has one unnamed table, (blob number, extent index), 8 and 4 bytes big-endian, to an extent of EXTENT
bytes (the last one shorter).

Order on disk. Bytes are durable before the record that names them; a record goes, and a Trash record
comes, in one transaction before the bytes are deleted; the Trash record goes last. A number is never
used twice, so deleting late can only delete what is dead.
"""

import time

import msgspec

from engine.kv.table import Counter, Record, Table
from engine.oci.documents import Descriptor
from engine.processes import Owner

__all__ = [
    "BLOBS",
    "CLOCKS",
    "CONTAINERS",
    "COUNTERS",
    "EXTENT",
    "FORMAT",
    "HOLDINGS",
    "IMAGES",
    "INGESTS",
    "INLINE",
    "KIN",
    "LAYERS",
    "LEASES",
    "LEASE_ITEMS",
    "MARKS",
    "MENTIONS",
    "MOUNTS",
    "NAMESPACES",
    "SMALL",
    "SNAPSHOTS",
    "TABLES",
    "TOUCHED",
    "TRASH",
    "UNFLUSHED",
    "Blob",
    "Clock",
    "Container",
    "Holding",
    "Image",
    "Ingest",
    "Kin",
    "LayerFolder",
    "Lease",
    "LeaseItem",
    "Mark",
    "Mentioned",
    "MountRecord",
    "Namespace",
    "Small",
    "Snapshot",
    "Touched",
    "Trash",
    "Unflushed",
    "now",
]

FORMAT = 2
"""Version of everything under a root; a process refuses a higher one."""

EXTENT = 4096 * 256 - 16
"""Bytes of an extent: whole pages less LMDB's page header, so that freed runs fit new ones."""


INLINE = 4096 * 4 - 32
"""Bytes of the largest blob that lies beside its record: whole pages less what heads them."""


class Blob(Record, frozen=True):
    """A committed blob. `number` finds its extents; times are nanoseconds since the epoch."""

    digest: str
    number: int
    size: int
    created: int
    updated: int
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Small(Record, frozen=True):
    """The bytes of a small blob."""

    data: bytes


class Ingest(Record, frozen=True):
    """A blob on its way in; its durable offset is what extents of `number` there are.

    It is kept while `owner` runs, as long as its lease lives, and until `expires`.
    """

    ref: str
    number: int
    total: int | None
    expected: str | None
    owner: Owner
    lease: str
    started: int
    updated: int = 0
    expires: int = 0


class Image(Record, frozen=True):
    """A name for a manifest or an index; `used` is when something was made of it, to the minute."""

    name: str
    target: Descriptor
    created: int
    updated: int
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    used: int = 0


class Lease(Record, frozen=True):
    """Keeps its members while it lives: as long as `owner` runs, if it has one, and until it expires.

    It expires, if ever, when the label `containerd.io/gc.expire` says. One that `outlasts` its owner
    lives until he is gone *and* it has expired: what he leaves behind is to be gone on with.
    """

    id: str
    created: int
    owner: Owner | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    outlasts: bool = False


class LeaseItem(Record, frozen=True):
    """One member of a lease: a node, and whether the lease's work made it rather than found it."""

    kind: str
    backend: str
    key: str
    made: bool = False


class Snapshot(Record, frozen=True):
    """A snapshot; `lease` is set while it is work in progress, which only that lease keeps.

    Its folder is `id`; committed ones of one layer may share it. `layer` is the folder that an active
    one, made to share it, keeps until then. `diff_id` is what the layer was verified to be, "" where
    nobody did.
    """

    key: str
    id: int
    kind: str
    parent: str
    created: int
    updated: int
    size: int = 0
    inodes: int = 0
    lease: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    diff_id: str = ""
    layer: int = 0

    @property
    def folders(self) -> tuple[int, ...]:
        """Its folder, and the one that it keeps."""
        return (self.id, self.layer) if self.layer else (self.id,)


class LayerFolder(Record, frozen=True):
    """Says that the snapshot `key` has, or keeps, the folder `number` with the layer of a diff ID."""

    key: str
    number: int


class Mentioned(Record, frozen=True):
    """Says that the node here mentions the one that the table's key begins with, and how."""

    how: str
    kind: str
    backend: str
    key: str


class Holding(Record, frozen=True):
    """Says that the blob with this digest has the bytes `number` in this namespace."""

    namespace: str
    number: int


class Touched(Record, frozen=True):
    """A node that was made, changed, pinned or newly referred to since a mark began."""

    kind: str
    backend: str
    key: str


class Mark(Record, frozen=True):
    """Says that `owner` is collecting a namespace, and since when: all that changes is noted."""

    owner: Owner
    started: int


class Clock(Record, frozen=True):
    """What the clocks showed at the last collection: in this `boot`, so long after its begin, so late.

    The time of day is doubted until so long after the begin of that boot.
    """

    boot: str
    boottime: int
    wall: int
    doubted_until: int = 0

    @property
    def is_doubted(self) -> bool:
        """Whether the time of day is doubted."""
        return self.boottime < self.doubted_until


class Namespace(Record, frozen=True):
    """What is said of a namespace; there is no record of most.

    An isolated one neither sees nor gives the bytes of others, but for what is labelled shareable.
    """

    name: str
    created: int
    updated: int
    isolated: bool = False
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class MountRecord(Record, frozen=True):
    """What was mounted; the snapshot `key` of `backend` is its own.

    That of a `container` is its provisioner's to make, mount again and remove, else it is a command's.
    `space` and `processes` are the inodes of the mount and pid namespaces of whoever mounted it;
    `mount_id`, `unique_id` and `device` are what the kernel knows the mount by, in this `boot`.
    """

    key: str
    target: str
    backend: str
    rw: bool
    image: str
    top: str
    state: str
    created: int
    boot: str
    space: int
    processes: int
    mount_id: int = 0
    unique_id: int = 0
    device: str = ""
    lease: str = ""
    container: str = ""


class Container(Record, frozen=True):
    """A container: what root file systems it has, of which image, and how far it is.

    `unique` names its folder, its cgroup and what the runtime knows it by: no other container, of any
    root or namespace, has the same. `since` says of each state when it was last entered. While someone
    works on it, `lease` is his. `order` is what it is to run, as JSON, if it runs at all. The kernel of
    `boot` has its mounts and processes: after another boot there are none.
    """

    id: str
    unique: str
    state: str
    since: dict[str, int]
    image: str
    target: str
    backend: str
    created: int
    boot: str
    parent: str = ""
    config: str = ""
    """The digest of the image's config, which is its ID."""
    top: str = ""
    platform: str = ""
    """What the image was asked for; "" is the host's."""
    readonly: bool = False
    volumes: dict[str, str] = msgspec.field(default_factory=dict)
    """Images that are mounted in it, by the path there."""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    quota: int = 0
    order: bytes = b""
    command: list[str] = msgspec.field(default_factory=list)
    stop_signal: int = 0
    """What is run in the end, of the image and the order, and what asks it to end."""
    pid: int = 0
    exit_code: int | None = None
    ended: int = 0
    errors: int = 0
    error: str = ""
    """How often destroying it failed, and why the last time."""
    lease: str = ""


class Kin(Record, frozen=True):
    """Says that a container has another as its parent."""

    parent: str
    child: str


class Unflushed(Record, frozen=True):
    """A snapshot that was committed, at this time of this `boot`, before its files were flushed.

    What is noted later has a higher number.
    """

    namespace: str
    key: str
    id: int
    number: int
    boot: str
    at: int


class Trash(Record, frozen=True):
    """Bytes that no record names any more: a blob number, or a snapshot id of a backend."""

    kind: str
    backend: str
    number: int


BLOBS = Table("blobs", Blob)
SMALL = Table("small", Small)
INGESTS = Table("ingests", Ingest)
IMAGES = Table("images", Image)
LEASES = Table("leases", Lease)
LEASE_ITEMS = Table("lease_items", LeaseItem)
SNAPSHOTS = Table("snapshots", Snapshot)
MENTIONS = Table("mentions", Mentioned)
HOLDINGS = Table("holdings", Holding)
LAYERS = Table("layers", LayerFolder)
TOUCHED = Table("touched", Touched)
MARKS = Table("marks", Mark)
NAMESPACES = Table("namespaces", Namespace)
CLOCKS = Table("clocks", Clock)
MOUNTS = Table("mounts", MountRecord)
CONTAINERS = Table("containers", Container)
KIN = Table("kin", Kin)
UNFLUSHED = Table("unflushed", Unflushed)
TRASH = Table("trash", Trash)
COUNTERS = Counter("counters")

TABLES = tuple(
    table.name
    for table in (
        BLOBS,
        SMALL,
        INGESTS,
        IMAGES,
        LEASES,
        LEASE_ITEMS,
        SNAPSHOTS,
        MENTIONS,
        HOLDINGS,
        LAYERS,
        TOUCHED,
        MARKS,
        CLOCKS,
        NAMESPACES,
        MOUNTS,
        CONTAINERS,
        KIN,
        UNFLUSHED,
        TRASH,
        COUNTERS,
    )
)


def now() -> int:
    """Return the time in nanoseconds since the epoch, for the records' times."""
    return time.time_ns()
