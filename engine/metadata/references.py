"""Who holds which image: sets of owners, that outlive every process, and end some time after a release.

Sync; safe from any thread. A reference is a lease without a process, one for each owner, name and
target: so the same owner counts once, however often he asks, and everything that knows leases knows
references (`lamina leases`, `gc --explain`, disk policies). It holds what the name meant when it was
taken; labels say for whom. There is no table, no timer and no memory beside it:

- a release gives the lease an expiry, and taking it again takes that away;
- removing is the collection that finds the lease expired: it looks again in each of its transactions
  (`engine.gc.collect`), tries again what fails, and a crash leaves it as much to do as there was;
- a name that was put for owners does not last: it goes with what it means. One that a user put, put
  again or pinned stays (`ImageStore.put`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from engine import labels, times
from engine.errors import DataLoss, InvalidArgument, NotFound, printable
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, IMAGES, LEASES, Lease, now
from engine.metadata import ledger
from engine.metadata.leases import expiry
from engine.metadata.nodes import CONTENT, LEASE, Node, blob_node
from engine.oci.reference import familiar

__all__ = ["CONTAINER", "HeldImage", "ReferenceStore", "check_owner"]

CONTAINER = "container/"
"""The owner that a container is begins so: its references go with it, by nobody else's call."""

_PREFIX = "held."
_HASH = 16  # bytes of each of the two hashes in a reference's ID
_BATCH = 100  # references that are released in one transaction: milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldImage:
    """An image that an owner holds; until when, if he has released it.

    `since` and `until` are nanoseconds since the epoch.
    """

    owner: str
    image: str
    """Its ID: the digest of its config."""
    name: str
    """What it was asked for by, in full; "" for its ID."""
    target: str
    """What the name meant, by digest."""
    since: int
    until: int | None = None


class ReferenceStore:
    """The references to images of one namespace."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def guard(self, lease: str, name: str) -> None:
        """Have a lease of some work hold what a name means now, if anything."""
        with self._meta.write() as txn:
            image = IMAGES.get(txn, self._namespace, name)
            if image is not None:
                ledger.pin(txn, self._namespace, lease, blob_node(image.target.digest))

    def take(self, owner: str, image: str, target: str, name: str = "") -> HeldImage:
        """Have an owner hold an image, which takes back that he released it.

        NotFound if it went meanwhile, InvalidArgument for what is no owner.
        """
        check_owner(owner)
        with self._meta.write() as txn:
            return self.put(txn, owner, image, target, name)

    def is_here(self, txn: Transaction, target: str) -> bool:
        """Say whether what a reference would hold is here, within a transaction."""
        return BLOBS.any(txn, self._namespace, target)

    def put(self, txn: Transaction, owner: str, image: str, target: str, name: str) -> HeldImage:
        """Have an owner hold an image, within a transaction. Raises NotFound."""
        about = {labels.HELD_OWNER: owner, labels.HELD_IMAGE: image, labels.HELD_NAME: name}
        key = _of_owner(owner) + _hash(name, target)
        if BLOBS.get(txn, self._namespace, target) is None:
            raise NotFound(f"image {familiar(name) if name else image} was removed meanwhile")
        old = self._get(txn, key)
        lease = Lease(id=key, created=old.created if old else now(), labels=labels.merge({}, about))
        ledger.put(txn, self._namespace, lease)
        ledger.pin(txn, self._namespace, key, blob_node(target))
        return self._told(txn, lease)

    def drop(self, txn: Transaction, owner: str) -> None:
        """Take away all that an owner holds, within a transaction, at once."""
        keys = list(self._found(txn, _of_owner(owner)))
        for key in keys:
            ledger.drop(txn, self._namespace, Node(LEASE, "", key))
        if keys:
            ledger.note_deletion(txn, self._namespace)

    def release(self, owner: str, images: Collection[str], *, delay_s: float) -> list[HeldImage]:
        """Release images that an owner holds, by ID, name or target; return what he held of them.

        It is removed once that has passed, if nobody else holds it. Released again, it is no later.
        """
        check_owner(owner)
        keys = self._keys(_of_owner(owner))
        return self._release(
            keys, lambda one: not {one.image, one.name, one.target}.isdisjoint(images), delay_s
        )

    def retain(self, owners: Collection[str], *, delay_s: float) -> list[HeldImage]:
        """Release what all other owners hold, and return that; containers keep what they hold.

        For who was restarted, and knows which owners there are still.
        """
        kept = frozenset(owners)

        def is_meant(one: HeldImage) -> bool:
            return one.owner not in kept and not one.owner.startswith(CONTAINER)

        return self._release(self._keys(_PREFIX), is_meant, delay_s)

    def walk(self) -> list[HeldImage]:
        """Return the references that can be read, the oldest first; the released ones until they go."""
        with self._meta.read() as txn:
            leases = (self._get(txn, key) for key in list(self._found(txn, _PREFIX)))
            found = [self._told(txn, lease) for lease in leases if lease]
        return sorted(found, key=lambda one: (one.since, one.owner, one.name))

    def _release(
        self, keys: Sequence[str], is_meant: Callable[[HeldImage], bool], delay_s: float
    ) -> list[HeldImage]:
        released: list[HeldImage] = []
        for start in range(0, len(keys), _BATCH):
            with self._meta.write() as txn:
                for key in keys[start : start + _BATCH]:
                    lease = self._get(txn, key)
                    if lease is None:
                        continue
                    held = self._told(txn, lease)
                    if is_meant(held):
                        if held.until is None:
                            self._end(txn, lease, delay_s)
                        released.append(held)
        return released

    def _end(self, txn: Transaction, lease: Lease, delay_s: float) -> None:
        if delay_s <= 0:  # at once, whatever the clock shows
            ledger.drop(txn, self._namespace, Node(LEASE, "", lease.id))
            ledger.note_deletion(txn, self._namespace)
            return
        ends = {labels.GC_EXPIRE: times.rfc3339(now() + int(delay_s * 10**9))}
        about = labels.merge(lease.labels, ends)
        ledger.put(txn, self._namespace, msgspec.structs.replace(lease, labels=about))

    def _keys(self, prefix: str) -> list[str]:
        with self._meta.read() as txn:
            return list(self._found(txn, prefix))

    def _found(self, txn: Transaction, prefix: str) -> Iterator[str]:
        return LEASES.beginning(
            txn, self._namespace, text=prefix, size=_LENGTH, name=lambda lease: lease.id
        )

    def _get(self, txn: Transaction, key: str) -> Lease | None:
        """Return the lease of a reference; None too for one that cannot be read: it holds on."""
        try:
            return LEASES.get(txn, self._namespace, key)
        except DataLoss:
            return None

    def _told(self, txn: Transaction, lease: Lease) -> HeldImage:
        members = ledger.members(txn, self._namespace, lease.id)
        return HeldImage(
            owner=lease.labels.get(labels.HELD_OWNER, ""),
            image=lease.labels.get(labels.HELD_IMAGE, ""),
            name=lease.labels.get(labels.HELD_NAME, ""),
            target=next((node.key for node in members if node.kind == CONTENT), ""),
            since=lease.created,
            until=expiry(lease),
        )


def check_owner(owner: str) -> None:
    """Raise InvalidArgument for what no owner is called."""
    if not owner or not owner.isprintable():
        raise InvalidArgument(f"{printable(owner)!r} is no owner of a reference; name it in plain text")
    if owner.startswith(CONTAINER):
        raise InvalidArgument(f"{owner} stands for a container; name the owner in another way")
    labels.check({labels.HELD_OWNER: owner})


def _of_owner(owner: str) -> str:
    """Return how the IDs of an owner's references begin: his name may be longer than an ID."""
    return f"{_PREFIX}{_hash(owner)}."


def _hash(*words: str) -> str:
    return blake2b(repr(words).encode(), digest_size=_HASH).hexdigest()


_LENGTH = len(_of_owner("")) + len(_hash())
