"""Namespaces: whose objects there are, and what is said of a namespace.

Sync; safe from any thread. A namespace needs no record: it exists with the first object in it. A record
says whether it is isolated, and has its labels.
"""

from collections.abc import Iterator
from types import MappingProxyType

import msgspec

from engine import labels as label_rules
from engine.errors import AlreadyExists, FailedPrecondition, NotFound, printable
from engine.identifiers import check_identifier
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import (
    BLOBS,
    CONTAINERS,
    IMAGES,
    INGESTS,
    LEASES,
    MOUNTS,
    NAMESPACES,
    SNAPSHOTS,
    Namespace,
    now,
)
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.leases import finish, is_live
from engine.metadata.nodes import LEASE, Node

__all__ = ["NamespaceStore"]

_NO_LABELS: Labels = MappingProxyType({})
_PLACES = (CONTAINERS, IMAGES, BLOBS, INGESTS, MOUNTS, LEASES)


class NamespaceStore:
    """The namespaces of a root."""

    def __init__(self, meta: Environment) -> None:
        self._meta = meta

    def walk(self) -> list[Namespace]:
        """Return the namespaces that have a record or any object, by name.

        It costs what there are of them, not what is in them. Those that cannot be read are left out.
        """
        with self._meta.read() as txn:
            records, damaged = NAMESPACES.survey(txn)
            used = set(_used(txn))
        said = {record.name: record for record in records}
        names = used.union(said).difference(lost.name for lost in damaged)
        found = [said.get(name) or _unsaid(name) for name in names]
        return sorted(found, key=lambda record: record.name)

    def damaged(self) -> list[Damaged]:
        """Return the namespaces whose records cannot be read."""
        with self._meta.read() as txn:
            return NAMESPACES.survey(txn)[1]

    def get(self, name: str) -> Namespace:
        """Return a namespace. Raises NotFound."""
        with self._meta.read() as txn:
            return self._get(txn, name)

    def _get(self, txn: Transaction, name: str) -> Namespace:
        record = NAMESPACES.get(txn, name)
        if record is None and not any(_kinds(txn, name)):
            raise NotFound(f"no namespace {printable(name)}; `lamina namespaces ls` lists them")
        return record or _unsaid(name)

    def create(self, name: str, *, isolated: bool = False, labels: Labels = _NO_LABELS) -> Namespace:
        """Make a namespace. InvalidArgument, AlreadyExists, also where there are objects in it."""
        check_identifier(name, "namespace")
        at = now()
        record = Namespace(
            name=name, created=at, updated=at, isolated=isolated, labels=label_rules.merge({}, labels)
        )
        with self._meta.write() as txn:
            if NAMESPACES.any(txn, name) or any(_kinds(txn, name)):
                raise AlreadyExists(f"namespace {name} exists; `lamina namespaces label` labels it")
            NAMESPACES.put(txn, record, name)
        return record

    def update(self, name: str, labels: Labels) -> Namespace:
        """Set labels on a namespace, deleting those whose new value is empty. Raises NotFound."""
        with self._meta.write() as txn:
            old = self._get(txn, name)
            at = now()
            record = msgspec.structs.replace(
                old,
                created=old.created or at,
                updated=at,
                labels=label_rules.merge(old.labels, labels),
            )
            NAMESPACES.put(txn, record, name)
            return record

    def remove(self, *names: str) -> None:
        """Remove namespaces, all or none, that have nothing in them but leases, which go with them.

        Raises NotFound, and FailedPrecondition that names what is left, or who is at work in it.
        """
        with self._meta.write() as txn:
            for name in names:
                self._remove(txn, name)
        for name in names:
            finish(self._meta, name)

    def _remove(self, txn: Transaction, name: str) -> None:
        self._get(txn, name)
        left = [kind for kind in _kinds(txn, name) if kind != LEASES.name]
        if left:
            raise FailedPrecondition(
                f"namespace {name} has {' and '.join(left)}; remove those first, "
                f"what no name keeps with `lamina --namespace {name} gc`"
            )
        self._end_leases(txn, name)
        NAMESPACES.delete(txn, name)

    def _end_leases(self, txn: Transaction, name: str) -> None:
        readable, damaged = LEASES.survey(txn, name)
        for lease in readable:
            if lease.owner is not None and is_live(self._meta.owners, lease, now()):
                raise FailedPrecondition(f"{lease.owner} is at work in namespace {name}; wait for it")
        for one in (*(lease.id for lease in readable), *(lease.name for lease in damaged)):
            ledger.drop(txn, name, Node(LEASE, "", one))


def _unsaid(name: str) -> Namespace:
    return Namespace(name=name, created=0, updated=0)


def _used(txn: Transaction) -> Iterator[str]:
    """Yield the namespaces that have objects, some of them several times."""
    for table in _PLACES:
        yield from table.branches(txn)
    for backend in SNAPSHOTS.branches(txn):
        yield from SNAPSHOTS.branches(txn, backend)


def _kinds(txn: Transaction, name: str) -> Iterator[str]:
    """Yield the kinds of objects that a namespace has."""
    for table in _PLACES:
        if table.any(txn, name):
            yield table.name
    if any(SNAPSHOTS.any(txn, backend, name) for backend in SNAPSHOTS.branches(txn)):
        yield SNAPSHOTS.name
