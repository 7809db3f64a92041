"""Leases: what keeps objects that nothing else names yet.

Sync; safe from any thread. A unit of work takes a lease before it begins; whatever it makes *or finds*
joins the lease in the same transaction, so that no collection can come between "it exists" and "it is
mine". A lease without expiry lives as long as its owner, the process that took it, or without one until
it is removed. Who wants more than one call to be kept makes a lease without an owner, which expires.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from engine import filters, limits, times
from engine import labels as label_rules
from engine.errors import (
    AlreadyExists,
    DataLoss,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    printable,
)
from engine.filters import Fields, Filter
from engine.identifiers import check_identifier
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import LEASES, Image, Lease, Snapshot, now
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, LEASE, Node
from engine.metadata.resources import Resource, parse_resource, resource
from engine.processes import Owner, Owners

__all__ = ["LeaseStore", "begin", "end", "expiring", "expiry", "finish", "is_live", "is_owned", "leased"]

_log = logging.getLogger(__name__)
_NO_LABELS: Labels = MappingProxyType({})
_LIFE = limits.LEASE_LIFE_S * 10**9


@contextmanager
def leased(meta: Environment, namespace: str) -> Iterator[str]:
    """Hold a lease of this process for the length of a block; give its ID."""
    with meta.write() as txn:
        lease = begin(txn, namespace, meta.owners.me)
    try:
        yield lease
    finally:
        end(meta, namespace, lease)


def begin(txn: Transaction, namespace: str, owner: Owner) -> str:
    """Make a lease that lasts as long as its owner at most; return its ID."""
    lease = Lease(id=secrets.token_hex(8), created=now(), owner=owner)
    ledger.put(txn, namespace, lease)
    return lease.id


def end(meta: Environment, namespace: str, lease: str) -> None:
    """End a lease of this process, if it can be: else it ends with the process."""
    try:
        with meta.write() as txn:
            ledger.drop(txn, namespace, Node(LEASE, "", lease))
        finish(meta, namespace, lease)
    except EngineError as error:  # what was done is done
        _log.warning("lease %s stays for now: %s", lease, error)


def finish(meta: Environment, namespace: str, *leases: str) -> None:
    """Let go, in short transactions, of what ended leases still have: some leases, or all."""
    with meta.read() as txn:
        ended = ledger.ended(txn, namespace, leases)
    for lease in ended:
        is_done = False
        while not is_done:
            with meta.write() as txn:
                is_done = LEASES.any(txn, namespace, lease) or ledger.let_go(txn, namespace, lease)


def expiry(lease: Lease | Image) -> int | None:
    """Return when a lease or a name expires, None if never. An expiry that cannot be read is none."""
    return times.moment(lease.labels.get(label_rules.GC_EXPIRE, ""))


def is_live(owners: Owners, lease: Lease, at: int | None) -> bool:
    """Say whether a lease still holds at the time `at`; without a time, it has not expired."""
    expires = expiry(lease)
    is_over = at is not None and expires is not None and expires <= at
    is_at_work = is_owned(owners, lease)
    if lease.outlasts:
        return is_at_work or not is_over
    return not is_over and (lease.owner is None or is_at_work)


def is_owned(owners: Owners, lease: Lease) -> bool:
    """Say whether a lease is that of a process, which lives."""
    return lease.owner is not None and owners.is_alive(lease.owner.id)


class LeaseStore:
    """The leases of one namespace, and what they hold."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def create(self, name: str = "", *, life: int | None = _LIFE, labels: Labels = _NO_LABELS) -> Lease:
        """Make a lease that no process owns, under an ID of its own if none is given; return it.

        `life` is how long it lives, in nanoseconds, None until it is removed; a label `gc.expire` goes
        before it. InvalidArgument, AlreadyExists.
        """
        if name:
            check_identifier(name, "lease")
        at = now()
        lease = Lease(
            id=name or secrets.token_hex(8),
            created=at,
            labels=label_rules.merge(expiring(at, life), labels),
        )
        while True:
            with self._meta.write() as txn:
                if LEASES.any(txn, self._namespace, lease.id):
                    raise AlreadyExists(f"lease {lease.id} exists; choose another ID")
                if ledger.let_go(txn, self._namespace, lease.id):  # of an earlier one, if any
                    ledger.put(txn, self._namespace, lease)
                    return lease

    def get(self, name: str) -> Lease:
        """Return a lease. Raises NotFound."""
        with self._meta.read() as txn:
            return self._get(txn, name)

    def _get(self, txn: Transaction, name: str) -> Lease:
        lease = LEASES.get(txn, self._namespace, name)
        if lease is None:
            raise _absent(name)
        return lease

    def walk(self, chosen: Sequence[Filter] = ()) -> list[Lease]:
        """Return the leases that match, whose records can be read, the oldest first."""
        with self._meta.read() as txn:
            found = LEASES.survey(txn, self._namespace)[0]
        matching = (lease for lease in found if filters.matches(chosen, _fields(lease)))
        return sorted(matching, key=lambda lease: (lease.created, lease.id))

    def damaged(self) -> list[Damaged]:
        """Return the IDs whose records cannot be read."""
        with self._meta.read() as txn:
            return LEASES.survey(txn, self._namespace)[1]

    def is_live(self, lease: Lease) -> bool:
        """Say whether a lease holds what it has now."""
        return is_live(self._meta.owners, lease, now())

    def delete(self, *names: str) -> None:
        """End leases, all or none, whatever they hold.

        Raises NotFound, and FailedPrecondition for one that a process is at work with.
        """
        with self._meta.write() as txn:
            for name in names:
                self._check_idle(txn, name)
            for name in names:
                ledger.drop(txn, self._namespace, Node(LEASE, "", name))
            ledger.note_deletion(txn, self._namespace)
        finish(self._meta, self._namespace, *names)

    def _check_idle(self, txn: Transaction, name: str) -> None:
        try:
            owner = self._get(txn, name).owner
        except DataLoss:
            return  # who made it cannot be told, nor what it keeps
        if owner is not None and self._meta.owners.is_alive(owner.id):
            raise FailedPrecondition(
                f"lease {name} is that of {owner}, which is at work; it ends with that"
            )

    # -- what they hold -----------------------------------------------------------------------

    def resources(self, name: str) -> list[Resource]:
        """Return what a lease holds. Raises NotFound."""
        with self._meta.read() as txn:
            self._get(txn, name)
            return [resource(node) for node in ledger.members(txn, self._namespace, name)]

    def add(self, name: str, *resources: Resource) -> None:
        """Add to what a lease holds, all or nothing.

        What is not there yet may be added, as in containerd: it is held from its first moment.
        NotFound for the lease, and what `parse_resource` raises.
        """
        nodes = [parse_resource(one) for one in resources]
        with self._meta.write() as txn:
            self._get(txn, name)
            for node in nodes:
                ledger.pin(txn, self._namespace, name, node)

    def remove(self, name: str, *resources: Resource) -> None:
        """Take away of what a lease holds; what it does not hold may be among it. Raises as `add`."""
        nodes = [parse_resource(one) for one in resources]
        with self._meta.write() as txn:
            self._get(txn, name)
            for node in nodes:
                ledger.unpin(txn, self._namespace, name, node)
            ledger.note_deletion(txn, self._namespace)

    def check(self, name: str) -> None:
        """Raise NotFound if there is no such lease, FailedPrecondition if it has ended."""
        if not self.is_live(self.get(name)):
            raise FailedPrecondition(f"lease {name} has ended; make another with `lamina leases create`")

    def members(self, name: str) -> list[Node]:
        """Return what a lease holds, nothing if there is no such lease."""
        with self._meta.read() as txn:
            return ledger.members(txn, self._namespace, name)

    def take_over(self, name: str, held: Iterable[Node]) -> None:
        """Have a lease hold what that of some work held, but for what is gone or unfinished.

        Raises NotFound.
        """
        with self._meta.write() as txn:
            self._get(txn, name)
            for node in held:
                if self._is_whole(txn, node):
                    ledger.pin(txn, self._namespace, name, node)

    def _is_whole(self, txn: Transaction, node: Node) -> bool:
        record = None if node.kind == INGEST else ledger.get(txn, self._namespace, node)
        return record is not None and not (isinstance(record, Snapshot) and record.lease)


def _absent(name: str) -> NotFound:
    return NotFound(f"no lease {printable(name)}; `lamina leases ls` lists them")


def expiring(at: int, life: int | None) -> Labels:
    """Return the label of what expires so long after `at`; none where it never does."""
    if life is None:
        return {}
    try:
        return {label_rules.GC_EXPIRE: times.rfc3339(at + life)}
    except OverflowError:
        raise InvalidArgument("no lease lives that long; give it no expiry instead") from None


def _fields(lease: Lease) -> Fields:
    return filters.fields({"id": lease.id}, lease.labels)
