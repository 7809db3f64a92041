"""Every table of a store and what is in it: the one place that draws `meta.lmdb`.

Sync (it reads the clock). Keys are composite (`keys`); NS is the namespace.

    table         key                        record          written by
    blobs         NS digest                  Blob            content
    ingests       NS ref                     Ingest          content
    images        NS name                    Image           metadata.images
    leases        NS id                      Lease           metadata.leases
    lease_items   NS lease kind backend key  LeaseItem       whoever makes or finds the object
    snapshots     backend NS key             Snapshot        metadata.lineage
    children      backend NS parent key      Child           metadata.lineage
    mounts        NS key                     MountRecord     metadata.mounts
    trash         kind backend number        Trash           whoever drops the record of bytes
    counters      sequence                   a number        blob numbers, snapshot ids

`blobs.lmdb` has one unnamed table: (blob number, extent index), 8 and 4 bytes big-endian, to an
extent of EXTENT bytes (the last one shorter).

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
    "CHILDREN",
    "COUNTERS",
    "EXTENT",
    "FORMAT",
    "IMAGES",
    "INGESTS",
    "LEASES",
    "LEASE_ITEMS",
    "MOUNTS",
    "SNAPSHOTS",
    "TABLES",
    "TRASH",
    "Blob",
    "Child",
    "Image",
    "Ingest",
    "Lease",
    "LeaseItem",
    "MountRecord",
    "Snapshot",
    "Trash",
    "now",
]

FORMAT = 1
"""Version of everything under a root; a process refuses a higher one."""

EXTENT = 4096 * 256 - 16
"""Bytes of an extent: whole pages less LMDB's page header, so that freed runs fit new ones."""


class Blob(Record, frozen=True):
    """A committed blob. `number` finds its extents; times are nanoseconds since the epoch."""

    digest: str
    number: int
    size: int
    created: int
    updated: int
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Ingest(Record, frozen=True):
    """A blob that `owner` is writing; its durable offset is what extents of `number` there are."""

    ref: str
    number: int
    total: int | None
    expected: str | None
    owner: Owner
    lease: str
    started: int


class Image(Record, frozen=True):
    """A name for a manifest or an index."""

    name: str
    target: Descriptor
    created: int
    updated: int
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Lease(Record, frozen=True):
    """Keeps its members while it lives: until `expires`, or as long as `owner` runs."""

    id: str
    created: int
    expires: int | None = None
    owner: Owner | None = None


class LeaseItem(Record, frozen=True):
    """One member of a lease: a blob (`backend` empty) or a snapshot."""

    kind: str
    backend: str
    key: str


class Snapshot(Record, frozen=True):
    """A snapshot; `lease` is set while it is work in progress, which only that lease keeps."""

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


class Child(Record, frozen=True):
    """Says that snapshot `key` stands on the parent that the table's key names."""

    key: str


class MountRecord(Record, frozen=True):
    """What a command mounted; the snapshot `key` of `backend` is its own.

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


class Trash(Record, frozen=True):
    """Bytes that no record names any more: a blob number, or a snapshot id of a backend."""

    kind: str
    backend: str
    number: int


BLOBS = Table("blobs", Blob)
INGESTS = Table("ingests", Ingest)
IMAGES = Table("images", Image)
LEASES = Table("leases", Lease)
LEASE_ITEMS = Table("lease_items", LeaseItem)
SNAPSHOTS = Table("snapshots", Snapshot)
CHILDREN = Table("children", Child)
MOUNTS = Table("mounts", MountRecord)
TRASH = Table("trash", Trash)
COUNTERS = Counter("counters")

TABLES = tuple(
    table.name
    for table in (
        BLOBS,
        INGESTS,
        IMAGES,
        LEASES,
        LEASE_ITEMS,
        SNAPSHOTS,
        CHILDREN,
        MOUNTS,
        TRASH,
        COUNTERS,
    )
)


def now() -> int:
    """Return the time in nanoseconds since the epoch, for the records' times."""
    return time.time_ns()
