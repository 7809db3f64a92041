"""Which images to remove when the disk fills up, or nobody has used them for long: kubelet's rules.

Sync. An image goes with all its names, or stays: what has one digest is one. None goes that is pinned,
that something is mounted or prepared of, or that is too young, nor for the disk's sake one whose removal
would free nothing. Of the others the one goes first that was not used for longest. What removing them
frees is reckoned from who holds what; then one collection takes it all, and the disk is looked at again.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from engine import labels, limits
from engine.errors import InvalidArgument
from engine.gc.clock import look, time_of
from engine.gc.collect import Collected
from engine.gc.holding import closure, only_held_by
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import IMAGES, Blob, Image, Snapshot
from engine.metadata import ledger, lineage
from engine.metadata.nodes import IMAGE, LABEL, PARENT, SNAPSHOT, Node, node_of
from engine.snapshots import Kind

__all__ = [
    "Chosen",
    "Disk",
    "Enforced",
    "Policy",
    "Unpinned",
    "asks",
    "choose",
    "enforce",
]

_S = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to remove images: durations in nanoseconds, shares of the disk in per cent."""

    high: int = 85
    """Images go when so much of the disk is in use,"""
    low: int = 80
    """until no more than so much is."""
    min_age: int = 120 * _S
    """No image goes that came or was used so short a time ago."""
    max_age: int | None = None
    """Whatever the disk, one goes that was not used for so long."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 100:
            raise InvalidArgument(f"low {self.low} and high {self.high}: 0 to 100, low not above high")
        if self.min_age < 0 or (self.max_age is not None and self.max_age < self.min_age):
            raise InvalidArgument("ages are not negative, and the maximum is not below the minimum")


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: bytes in all, and those that can be had."""

    total: int
    free: int

    @property
    def used(self) -> float:
        """How much is in use, in per cent."""
        return 100 - self.free * 100 / self.total if self.total else 0.0

    def above(self, low: int) -> int:
        """Return how many bytes are in use beyond a share of `low` per cent."""
        return max(0, self.total * (100 - low) // 100 - self.free)


@dataclass(frozen=True, slots=True)
class Unpinned:
    """An image with all its names, and when it last came or may have been used."""

    names: Sequence[str]
    used: int


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """An image to remove, by all its names: why, and how many bytes go with it."""

    names: Sequence[str]
    used: int
    """When it last came or may have been used, in nanoseconds since the epoch."""
    why: str
    bytes: int


class Enforced(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a policy: what it removed, what the collections did, the disk in per cent."""

    chosen: list[Chosen]
    collected: Collected
    before: float
    after: float


def _all_unpinned(meta: Environment, namespace: str) -> list[Unpinned]:
    """Return the images of a namespace that are not pinned, the least recently used first."""
    with meta.read() as txn:
        images = IMAGES.survey(txn, namespace)[0]
    together: defaultdict[str, list[Image]] = defaultdict(list)
    for image in images:
        together[image.target.digest].append(image)
    found = [_unpinned(same) for same in together.values() if not any(map(_is_pinned, same))]
    return sorted(found, key=lambda candidate: (candidate.used, candidate.names))


def _unpinned(images: Collection[Image]) -> Unpinned:
    used = max(max(image.created, image.updated, _last_use(image)) for image in images)
    return Unpinned([image.name for image in images], used)


def _last_use(image: Image) -> int:
    """Return when an image may have been used last: not every use is noted."""
    return image.used + limits.USE_NOTED_S * _S if image.used else 0


def _is_pinned(image: Image) -> bool:
    return image.labels.get(labels.PINNED) == labels.PINNED_VALUE


def asks(meta: Environment, namespace: str, policy: Policy, disk: Disk, at: int) -> bool:
    """Say whether a policy would have images removed at the time `at`, if there are any it lets go."""
    if disk.used >= policy.high and disk.above(policy.low):
        return True
    if policy.max_age is None:
        return False
    return any(at - one.used >= policy.max_age for one in _all_unpinned(meta, namespace)[:1])


def choose(
    meta: Environment,
    namespace: str,
    policy: Policy,
    wanted: int,
    at: int,
) -> Iterator[Chosen]:
    """Yield what to remove at the time `at`: what outlived its age, and what frees `wanted` bytes."""
    freed = 0
    gone: set[Node] = set()
    folders = lineage.Folders()
    for candidate in _all_unpinned(meta, namespace):
        age = max(0, at - candidate.used)  # a use is reckoned up to a minute late
        is_old = policy.max_age is not None and age >= policy.max_age
        if age < policy.min_age or not (is_old or freed < wanted):
            return  # as all that follow were used later
        with meta.read() as txn:
            ending = _ending(meta, txn, namespace, candidate, gone)
            frees = sum(_size(txn, namespace, node, folders) for node in ending)
        if ending and (frees or is_old):
            gone |= ending
            freed += frees
            why = "its age" if is_old else "the disk"
            yield Chosen(names=candidate.names, used=candidate.used, why=why, bytes=frees)


def _ending(
    meta: Environment, txn: Transaction, namespace: str, candidate: Unpinned, gone: Collection[Node]
) -> set[Node]:
    """Return what ends with an image, after what is gone; nothing if it is in use or has ended."""
    images = [Node(IMAGE, "", name) for name in candidate.names]
    nodes = {node: None for image in images for node in closure(txn, namespace, image)}
    if _is_in_use(txn, namespace, nodes):
        return set()
    ending = only_held_by(meta.owners, txn, namespace, list(nodes), {*gone, *images})
    return {*ending}.difference(gone)


def _is_in_use(txn: Transaction, namespace: str, nodes: Iterable[Node]) -> bool:
    """Say whether something that is no layer stands on what one of some blobs was unpacked into."""
    tops = (
        mention.node
        for node in nodes
        for mention in ledger.mentioning(txn, namespace, node)
        if mention.how == LABEL and mention.node.kind == SNAPSHOT
    )
    above = (mention.node for top in tops for mention in ledger.mentioners(txn, namespace, top, PARENT))
    records = (ledger.get(txn, namespace, node) for node in above)
    return any(isinstance(one, Snapshot) and one.kind != Kind.COMMITTED for one in records)


def _size(txn: Transaction, namespace: str, node: Node, folders: lineage.Folders) -> int:
    record = ledger.get(txn, namespace, node)
    if isinstance(record, Blob):
        return 0 if ledger.is_elsewhere(txn, namespace, record) else record.size
    if isinstance(record, Snapshot) and folders.is_last(txn, namespace, node, record):
        return record.size
    return 0


def enforce(
    meta: Environment,
    namespace: str,
    policy: Policy,
    *,
    disk: Callable[[], Disk],
    collect: Callable[[], Collected],
    dry_run: bool = False,
) -> Enforced:
    """Collect, and remove images until the policy is met or none is left that it lets go.

    With `dry_run` only say what would be removed; `collect` must then not remove anything either.
    """
    before = disk()
    collected = collect()
    with meta.read() as txn:
        at = time_of(look(txn, note=False))
    if at is None or collected.is_halted:  # who knows how old anything is, or what would go with it
        return Enforced(chosen=[], collected=collected, before=before.used, after=disk().used)
    found = disk()
    if dry_run:
        found = Disk(found.total, found.free + collected.blob_bytes + collected.snapshot_bytes)
    is_full = found.used >= policy.high
    removed: list[Chosen] = []
    while True:
        wanted = found.above(policy.low) if is_full else 0
        chosen = list(choose(meta, namespace, policy, wanted, at))
        if dry_run:
            removed = chosen
            break
        gone = [one for one in chosen if _remove(meta, namespace, one)]
        if not gone:
            break
        removed += gone
        collected = collected.with_more(collect())
        found = disk()
    return Enforced(chosen=removed, collected=collected, before=before.used, after=found.used)


def _remove(meta: Environment, namespace: str, chosen: Chosen) -> bool:
    """Take an image's names away unless it was used, pinned or named anew since; say whether it was."""
    with meta.write() as txn:
        images = [IMAGES.get(txn, namespace, name) for name in chosen.names]
        there = [image for image in images if image is not None and not _is_pinned(image)]
        nodes = {node for image in there for node in closure(txn, namespace, node_of(image))}
        if len(there) < len(images) or _unpinned(there).used != chosen.used:
            return False
        if _is_in_use(txn, namespace, nodes):
            return False
        for image in there:
            ledger.drop(txn, namespace, node_of(image))
    return True
