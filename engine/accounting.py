"""What a store takes up on the disk, by whom, and what removing an image would free.

Sync. It asks of one object at a time who holds it (`engine.gc.holding`), so that it takes memory for one
image, and a row for each, whatever else the store has. Each image and each batch of records is seen by a
transaction of its own: what others change meanwhile counts or does not.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.content.extents import stored_bytes
from engine.errors import DataLoss
from engine.fs.usage import own, taken
from engine.gc.clock import look, time_of
from engine.gc.holding import closure, holder
from engine.kv.environment import Transaction
from engine.kv.schema import BLOBS, INGESTS, SNAPSHOTS, TRASH, Blob, Image, Ingest, Snapshot, Trash
from engine.metadata import ledger
from engine.metadata.containers import Container, ContainerStore
from engine.metadata.leases import expiry
from engine.metadata.nodes import CONTENT, SNAPSHOT, Node, node_of, snapshot_node
from engine.progress import Report, Step, silent
from engine.provision.places import all_folders, folder_of, mount_keys
from engine.root import Root
from engine.snapshots import Kind

__all__ = ["Accounts", "ContainerShare", "ImageUsage", "Overhead", "Share", "StoreUsage"]

_KNOWN = 20_000  # objects of which it is remembered who holds them
_RELEASE_EVERY = 100  # images looked at between two calls that give the memory of that back


class Share(msgspec.Struct, frozen=True):
    """Bytes of blobs, and what snapshots take up."""

    content: int = 0
    snapshots: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.content + self.snapshots

    def __add__(self, other: "Share") -> "Share":
        return Share(self.content + other.content, self.snapshots + other.snapshots)

    def __sub__(self, other: "Share") -> "Share":
        return Share(max(0, self.content - other.content), max(0, self.snapshots - other.snapshots))


class ImageUsage(msgspec.Struct, frozen=True):
    """What an image name keeps: by itself, which removing it would free, and together with others."""

    name: str
    digest: str
    exclusive: Share
    shared: Share


class ContainerShare(msgspec.Struct, frozen=True, kw_only=True):
    """What a container takes up beside its image; removing it frees that."""

    name: str
    image: str
    written: int
    """What was written to its root file system."""
    files: int
    """Its logs, and what it is run by."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.written + self.files


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """What a store takes up beyond what it keeps."""

    records: int
    """Both LMDB files, but for the bytes of blobs and what is free."""
    free: int
    """Pages of `blobs.lmdb` that hold nothing, and that new blobs will fill."""
    files: int
    """Folders, and small files, the reserve among them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.records + self.free + self.files


class StoreUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A store's disk, each byte once."""

    images: list[ImageUsage]
    exclusive: Share
    """What one image keeps by itself, of all images."""
    shared: Share
    """What several images keep, or containers, mounts, leases or labels."""
    containers: list[ContainerShare]
    garbage: Share
    """What nothing holds."""
    elsewhere: Share
    """What only other namespaces have."""
    overhead: Overhead

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.exclusive, self.shared, self.garbage, self.elsewhere, self.overhead)
        return sum(part.total for part in parts) + sum(one.total for one in self.containers)


class Accounts:
    """The books of one namespace of a root, as they are when they are asked.

    What backends in `kept` have stays, as they cannot be used: no image frees it.
    """

    def __init__(self, root: Root, namespace: str, kept: Collection[str]) -> None:
        self._root = root
        self._namespace = namespace
        self._kept = kept
        with root.meta.read() as txn:
            self._at = time_of(look(txn, note=False))
        self._counted: set[Path] = set()  # folders of snapshots and containers, measured whole

    # -- images -------------------------------------------------------------------------------

    def image(self, image: Image) -> ImageUsage:
        """Return what a name keeps."""
        alone, together = self.kept_by([image])
        expires = expiry(image)
        if self._at is not None and expires is not None and expires <= self._at:
            alone = Share()  # which is garbage by now
        return ImageUsage(image.name, image.target.digest, alone, together)

    def kept_by(self, images: Sequence[Image]) -> tuple[Share, Share]:
        """Return what some names keep that nothing else does, and what of theirs others keep too."""
        alone, together, own_nodes = Share(), Share(), list(map(node_of, images))
        counted: set[tuple[str, int]] = set()  # folders that several snapshots of the image have
        known: dict[Node, Node | None] = {}
        with self._root.meta.read() as txn:
            parts = {part: None for node in own_nodes for part in closure(txn, self._namespace, node)}
            for part in parts:
                share = self._share(txn, part, counted)
                if share.total and self._stays(txn, part, but=own_nodes, known=known):
                    together += share
                else:
                    alone += share
        return alone, together

    def _stays(
        self, txn: Transaction, node: Node, *, but: Collection[Node], known: dict[Node, Node | None]
    ) -> bool:
        """Say whether the bytes of an object stay, whatever only `but` holds."""
        try:
            if node.backend in self._kept or self._is_elsewhere(txn, node):
                return True
            return any(
                holder(self._root.owners, txn, self._namespace, one, but=but, at=self._at, known=known)
                for one in self._sharers(txn, node)
            )
        except DataLoss:  # nobody knows who holds it: a collection keeps it too
            return True

    def _sharers(self, txn: Transaction, node: Node) -> Iterator[Node]:
        """Yield what has the same bytes as an object, itself among it."""
        record = ledger.get(txn, self._namespace, node) if node.kind == SNAPSHOT else None
        if isinstance(record, Snapshot):
            yield from ledger.sharers(txn, self._namespace, node, record)
        else:
            yield node

    def _is_elsewhere(self, txn: Transaction, node: Node) -> bool:
        """Say whether another namespace has the same bytes."""
        blob = BLOBS.get(txn, self._namespace, node.key) if node.kind == CONTENT else None
        return blob is not None and ledger.is_elsewhere(txn, self._namespace, blob)

    def _share(self, txn: Transaction, node: Node, counted: set[tuple[str, int]]) -> Share:
        with suppress(DataLoss):
            record = ledger.get(txn, self._namespace, node)
            if isinstance(record, Blob):
                return Share(content=record.size)
            if isinstance(record, Snapshot) and (node.backend, record.id) not in counted:
                if record.diff_id:
                    counted.add((node.backend, record.id))
                return Share(snapshots=record.size)
        return Share()

    # -- all of it ----------------------------------------------------------------------------

    def store(self, images: Sequence[Image], report: Report = silent) -> StoreUsage:
        """Return what the whole root takes up, and what these images of the namespace do."""
        rows = []
        for number, image in enumerate(images):
            report(Step.COUNT, "images", len(images), number)
            rows.append(self.image(image))
            if number % _RELEASE_EVERY == 0:
                self._root.meta.release_pages()
        report(Step.COUNT, "images", len(images), len(images))
        known: dict[Node, Node | None] = {}
        kept, garbage, elsewhere = Share(), self._dropped(), Share()
        containers = ContainerStore(self._root.meta, self._namespace).walk()
        owners = {key: container.id for container in containers for key in mount_keys(container)}
        written: Counter[str] = Counter()
        for namespace, node, share in self._objects():
            if namespace != self._namespace:
                elsewhere += share
                continue
            with self._root.meta.read() as txn:
                if not self._stays(txn, node, but=(), known=known):
                    garbage += share
                elif node.kind == SNAPSHOT and node.key in owners:
                    written[owners[node.key]] += share.total
                else:
                    kept += share
            if len(known) > _KNOWN:
                known.clear()
        exclusive = sum((row.exclusive for row in rows), Share())
        return StoreUsage(
            images=rows,
            exclusive=exclusive,
            shared=kept - exclusive,
            containers=[self._container(one, written[one.id]) for one in containers],
            garbage=garbage,
            elsewhere=elsewhere,
            overhead=self._overhead((kept + garbage + elsewhere).content),
        )

    def _container(self, container: Container, written: int) -> ContainerShare:
        files = self._measured(folder_of(self._root.path, container.unique))
        return ContainerShare(name=container.id, image=container.image, written=written, files=files)

    def _namespaces(self) -> list[str]:
        """Return the namespaces that have anything, this one first."""
        with self._root.meta.read() as txn:
            found = {*BLOBS.branches(txn), *INGESTS.branches(txn)}
            for backend in SNAPSHOTS.branches(txn):
                found.update(SNAPSHOTS.branches(txn, backend))
        return [self._namespace, *sorted(found - {self._namespace})]

    def _objects(self) -> Iterator[tuple[str, Node, Share]]:
        """Yield everything that takes up space, once, in the first namespace that has it."""
        meta = self._root.meta
        with meta.read() as txn:
            backends = list(SNAPSHOTS.branches(txn))
        namespaces = self._namespaces()
        for at, namespace in enumerate(namespaces):
            for blob in BLOBS.walk(meta, namespace):
                if isinstance(blob, Blob) and not self._is_in(namespaces[:at], blob):
                    yield namespace, node_of(blob), Share(content=blob.size)
            for ingest in INGESTS.walk(meta, namespace):
                if isinstance(ingest, Ingest):
                    size = stored_bytes(self._root.blobs, ingest.number)
                    yield namespace, node_of(ingest), Share(content=size)
            for backend in backends:
                for record in SNAPSHOTS.walk(meta, backend, namespace):
                    if isinstance(record, Snapshot) and self._is_first(backend, namespace, record):
                        size = self._size(backend, record)
                        yield namespace, snapshot_node(backend, record.key), Share(snapshots=size)

    def _is_first(self, backend: str, namespace: str, record: Snapshot) -> bool:
        """Say whether a snapshot is the one that counts of those that have its folder."""
        if record.kind != Kind.COMMITTED:
            return True
        node = snapshot_node(backend, record.key)
        with self._root.meta.read() as txn:
            for other in ledger.sharers(txn, namespace, node, record):
                found = ledger.get(txn, namespace, other)
                if isinstance(found, Snapshot) and found.kind == Kind.COMMITTED:
                    return other == node
        return True

    def _is_in(self, namespaces: Sequence[str], blob: Blob) -> bool:
        if not namespaces:
            return False
        with self._root.meta.read() as txn:
            try:
                held = ledger.holdings(txn, blob.digest)
            except DataLoss:
                return False
        return any(one.namespace in namespaces and one.number == blob.number for one in held)

    # -- on the disk --------------------------------------------------------------------------

    def _size(self, backend: str, record: Snapshot) -> int:
        """Return what a snapshot takes up: measured now if it can change."""
        if record.kind == Kind.COMMITTED:
            return record.size
        return self._measured(self._root.snapshots / backend / str(record.id))

    def _measured(self, folder: Path) -> int:
        self._counted.add(folder)
        return _taken(folder)

    def _dropped(self) -> Share:
        """Return what was dropped and is not deleted yet."""
        content, snapshots = 0, _taken(self._root.trash) - own(self._root.trash)
        for trash in TRASH.walk(self._root.meta):
            if isinstance(trash, Trash) and trash.backend:
                snapshots += self._measured(self._root.snapshots / trash.backend / str(trash.number))
            elif isinstance(trash, Trash):
                content += stored_bytes(self._root.blobs, trash.number)
        return Share(content, snapshots)

    def _overhead(self, content: int) -> Overhead:
        root = self._root
        free = root.blobs.unused()
        lmdb = (root.meta.path, root.blobs.path)
        containers = all_folders(root.path)
        counted = {*lmdb, root.trash, root.snapshots, containers, *self._counted}
        others = [path for path in root.path.iterdir() if path not in counted]
        with suppress(FileNotFoundError):  # no store has had a container from the start
            others += [path for path in containers.iterdir() if path not in counted]
        folders = (root.path, root.trash, containers)
        return Overhead(
            records=max(0, sum(map(_taken, lmdb)) - content - free),
            free=free,
            files=sum(map(own, folders)) + sum(map(_taken, others)) + self._folders(),
        )

    def _folders(self) -> int:
        """Return what the folders that snapshots are in take up, and what lies beside their trees."""
        size = own(self._root.snapshots)
        for backend in self._root.snapshots.iterdir():
            size += own(backend)
            if not backend.is_dir():
                continue
            with os.scandir(backend) as entries:
                for entry in entries:
                    place = backend / entry.name
                    if place not in self._counted:
                        size += own(place)
                        with suppress(FileNotFoundError, NotADirectoryError):  # it went, or is a file
                            size += sum(map(own, place.iterdir()))
        return size


def _taken(path: Path) -> int:
    return taken(path)[0]
