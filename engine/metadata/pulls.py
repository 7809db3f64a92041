"""Pulls under way, and those that were not finished: a lease each, which says what of.

Sync; safe from any thread. Such a lease outlasts the process at work: what a pull that failed, or was
killed, has brought in stays for a day, and the next pull of that name takes it over. The one that puts
the name ends it in the same transaction. Its ID begins with a hash of the name: leases of other things,
of which there may be many thousands, are not looked at.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from engine import labels, limits
from engine.errors import DataLoss
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import LEASES, Image, Lease, now
from engine.labels import merge
from engine.metadata import ledger
from engine.metadata.images import ImageStore
from engine.metadata.leases import expiring, finish, is_owned
from engine.metadata.nodes import LEASE, Node, blob_node
from engine.oci.documents import Descriptor

__all__ = ["Pull", "PullStore"]

_PREFIX = "pull."
_HASH = 16  # bytes
_RANDOM = 8


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull that did not put its name yet: what of, and who is at work on it, if anybody.

    `started` is nanoseconds since the epoch.
    """

    lease: str
    reference: str
    target: Descriptor | None
    started: int
    owner: str


class PullStore:
    """The pulls of one namespace."""

    def __init__(self, meta: Environment, namespace: str, images: ImageStore) -> None:
        self._meta = meta
        self._namespace = namespace
        self._images = images

    def begin(self, reference: str) -> str:
        """Begin to pull a name, with what an earlier pull of it left; return the lease."""
        with self._meta.write() as txn:
            left = next(self._idle(txn, reference), None)
            lease = left or _new(reference)
            about = merge(lease.labels, {labels.PULL_OF: reference, **_life()})
            record = msgspec.structs.replace(lease, owner=self._meta.owners.me, labels=about)
            ledger.put(txn, self._namespace, record)
        return lease.id

    def note(self, lease: str, target: Descriptor) -> None:
        """Note what the name means. FailedPrecondition if the lease was ended by hand."""
        told = msgspec.json.encode(
            {"mediaType": target.media_type, "digest": target.digest, "size": target.size}
        ).decode()
        with self._meta.write() as txn:
            ledger.check_lease(txn, self._namespace, lease)
            record = self._get(txn, lease)
            if record and record.labels.get(labels.PULL_TARGET) != told:
                about = merge(record.labels, {labels.PULL_TARGET: told})
                ledger.put(txn, self._namespace, msgspec.structs.replace(record, labels=about))

    def finish(
        self, lease: str, reference: str, target: Descriptor, *, heir: str, lasting: bool = True
    ) -> Image:
        """Put the name and end its pulls, but for those of others who are at work; return the image.

        The lease `heir` holds the image from then on. What `lasting` says is in `ImageStore.put`.
        """
        with self._meta.write() as txn:
            image = self._images.put(txn, reference, target, replace=True, lasting=lasting)
            ledger.pin(txn, self._namespace, heir, blob_node(target.digest))
            over = [lease, *(one.id for one in self._idle(txn, reference))]
            for one in over:
                ledger.drop(txn, self._namespace, Node(LEASE, "", one))
        finish(self._meta, self._namespace, *over)
        return image

    def leave(self, lease: str) -> None:
        """Leave what a pull has brought in to the next one; if that is nothing, the pull is over."""
        with self._meta.write() as txn:
            record = self._get(txn, lease)
            if record is None:
                return
            if ledger.members(txn, self._namespace, lease):
                about = merge(record.labels, _life())
                record = msgspec.structs.replace(record, owner=None, labels=about)
                ledger.put(txn, self._namespace, record)
            else:
                ledger.drop(txn, self._namespace, Node(LEASE, "", lease))

    def walk(self) -> list[Pull]:
        """Return the pulls that did not put their names, the oldest first."""
        with self._meta.read() as txn:
            found = list(self._beginning(txn, _PREFIX))
        pulls = [self._told(lease) for lease in found]
        return sorted(pulls, key=lambda pull: (pull.started, pull.lease))

    def _told(self, lease: Lease) -> Pull:
        return Pull(
            lease=lease.id,
            reference=lease.labels.get(labels.PULL_OF, ""),
            target=_target(lease.labels.get(labels.PULL_TARGET, "")),
            started=lease.created,
            owner=str(lease.owner) if is_owned(self._meta.owners, lease) else "",
        )

    def _idle(self, txn: Transaction, reference: str) -> Iterator[Lease]:
        """Yield the leases of pulls of a name that nobody is at work on."""
        for lease in self._beginning(txn, _of_name(reference)):
            if not is_owned(self._meta.owners, lease):
                yield lease

    def _beginning(self, txn: Transaction, prefix: str) -> Iterator[Lease]:
        """Yield the leases of pulls whose IDs begin so; one that cannot be read holds on."""
        keys = LEASES.beginning(
            txn, self._namespace, text=prefix, size=_LENGTH, name=lambda lease: lease.id
        )
        yield from filter(None, [self._get(txn, key) for key in keys])

    def _get(self, txn: Transaction, lease: str) -> Lease | None:
        try:
            return LEASES.get(txn, self._namespace, lease)
        except DataLoss:
            return None


def _of_name(reference: str) -> str:
    """Return how the IDs of a name's pulls begin: it may be longer than an ID."""
    return f"{_PREFIX}{blake2b(reference.encode(), digest_size=_HASH).hexdigest()}."


_LENGTH = len(_of_name("")) + 2 * _RANDOM


def _new(reference: str) -> Lease:
    return Lease(id=_of_name(reference) + secrets.token_hex(_RANDOM), created=now(), outlasts=True)


def _target(told: str) -> Descriptor | None:
    try:
        return msgspec.json.decode(told, type=Descriptor)
    except msgspec.DecodeError:  # none was noted, or someone changed the label
        return None


def _life() -> labels.Labels:
    return expiring(now(), limits.LEASE_LIFE_S * 10**9)
