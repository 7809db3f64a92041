"""The containers of a namespace: which there are, in what state, and which states follow which.

Sync; safe from any thread and process. The record of a container is a claim: it comes before everything
that is made for it (references to images, mounts, folders, processes), all of which is found by its ID,
and goes last. Whoever works on it holds it by a lease; one whose lease is dead is what a crash left.
Every change is made only to the record that was read.

    provisioning   its root file systems are being made, while `lease` lives
    provisioned    they are there; nothing runs in them
    preparing      its bundle is being written, while `lease` lives
    starting       the runtime is at work, while `lease` lives
    running        its process runs, or did when somebody last looked
    stopped        its process has ended, or was never begun; its root file systems are there
    destroying     it is on its way out: while `lease` lives, or else until that is tried again
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from engine.errors import AlreadyExists, FailedPrecondition, NotFound
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import CONTAINERS, KIN, LEASES, Container, Kin, now
from engine.kv.table import Damaged
from engine.metadata.leases import is_live
from engine.processes import boot_id

__all__ = [
    "ON_THE_WAY",
    "TRANSITIONS",
    "Container",
    "ContainerState",
    "ContainerStore",
    "check_follows",
    "entered",
    "may_run",
]


class ContainerState(StrEnum):
    """The states of a container."""

    PROVISIONING = "provisioning"
    PROVISIONED = "provisioned"
    PREPARING = "preparing"
    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"
    DESTROYING = "destroying"


TRANSITIONS: Mapping[ContainerState, frozenset[ContainerState]] = {
    ContainerState.PROVISIONING: frozenset({ContainerState.PROVISIONED, ContainerState.DESTROYING}),
    ContainerState.PROVISIONED: frozenset({ContainerState.PREPARING, ContainerState.DESTROYING}),
    ContainerState.PREPARING: frozenset({ContainerState.STARTING, ContainerState.DESTROYING}),
    ContainerState.STARTING: frozenset(
        {ContainerState.RUNNING, ContainerState.STOPPED, ContainerState.DESTROYING}
    ),
    ContainerState.RUNNING: frozenset({ContainerState.STOPPED, ContainerState.DESTROYING}),
    ContainerState.STOPPED: frozenset({ContainerState.DESTROYING}),
    ContainerState.DESTROYING: frozenset({ContainerState.DESTROYING}),  # what failed is tried again
}
"""Which states follow which; from `destroying` the only other way is that the record goes."""

ON_THE_WAY = frozenset({ContainerState.PROVISIONING, ContainerState.DESTROYING})
"""The states in which a container has not all of its root file systems: not yet, or not any more."""


def may_run(container: Container) -> bool:
    """Say whether a process of this boot may run in a container, as far as its record tells."""
    began = ContainerState.STARTING in container.since or ContainerState.RUNNING in container.since
    return began and ContainerState.STOPPED not in container.since and container.boot == boot_id()


def check_follows(old: Container, state: ContainerState) -> None:
    """Raise FailedPrecondition if a container cannot enter a state from the one that it is in."""
    if state not in TRANSITIONS[ContainerState(old.state)]:
        raise FailedPrecondition(f"container {old.id} is {old.state}: it cannot become {state}")


def entered(old: Container, state: ContainerState, **changes: Any) -> Container:  # noqa: ANN401
    """Return a container as it is once it has entered a state; whether that may be is not asked."""
    since = {**old.since, str(state): now()}
    return msgspec.structs.replace(old, state=str(state), since=since, **changes)


class ContainerStore:
    """The containers of one namespace."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def put_new(self, txn: Transaction, container: Container) -> None:
        """Put the record of a new container. AlreadyExists if there is one, NotFound without its parent.

        FailedPrecondition for a parent that is on its way out.
        """
        if CONTAINERS.any(txn, self._namespace, container.id):
            raise AlreadyExists(f"container {container.id} exists; choose another name")
        parent = self._get(txn, container.parent) if container.parent else None
        if parent and parent.state == ContainerState.DESTROYING:
            raise FailedPrecondition(f"container {parent.id} is being removed")
        CONTAINERS.put(txn, container, self._namespace, container.id)
        if parent:
            kin = Kin(parent=parent.id, child=container.id)
            KIN.put(txn, kin, self._namespace, parent.id, container.id)

    def get(self, name: str) -> Container:
        """Return a container by its ID. Raises NotFound."""
        with self._meta.read() as txn:
            return self._get(txn, name)

    def _get(self, txn: Transaction, name: str) -> Container:
        found = CONTAINERS.get(txn, self._namespace, name)
        if found is None:
            raise NotFound(f"no container {name}; `lamina ps --all` lists them")
        return found

    def find(self, name: str) -> tuple[Container, bool] | None:
        """Return a container, if there is one, and whether somebody works on it now."""
        with self._meta.read() as txn:
            found = CONTAINERS.get(txn, self._namespace, name)
            return None if found is None else (found, self.is_held_in(txn, found))

    def walk(self) -> list[Container]:
        """Return the containers whose records can be read, the oldest first."""
        with self._meta.read() as txn:
            found, _ = CONTAINERS.survey(txn, self._namespace)
        return sorted(found, key=lambda one: (one.created, one.id))

    def damaged(self) -> list[Damaged]:
        """Return the IDs whose records cannot be read: what those use, nobody knows."""
        with self._meta.read() as txn:
            return CONTAINERS.survey(txn, self._namespace)[1]

    def is_held(self, container: Container) -> bool:
        """Say whether somebody works on it now."""
        with self._meta.read() as txn:
            return self.is_held_in(txn, container)

    def is_held_in(self, txn: Transaction, container: Container) -> bool:
        """Do what `is_held` does, within a transaction."""
        lease = LEASES.get(txn, self._namespace, container.lease) if container.lease else None
        return lease is not None and is_live(self._meta.owners, lease, now())

    def move(self, old: Container, state: ContainerState, **changes: Any) -> Container:  # noqa: ANN401
        """Have a container enter a state, and change what else is said; return its record.

        FailedPrecondition, and nothing changes, if that state does not follow, or if the record is not
        as it was read any more.
        """
        check_follows(old, state)
        changed = entered(old, state, **changes)
        with self._meta.write() as txn:
            if CONTAINERS.get(txn, self._namespace, old.id) != old:
                raise FailedPrecondition(f"container {old.id} was changed meanwhile; try again")
            CONTAINERS.put(txn, changed, self._namespace, old.id)
        return changed

    def drop(self, txn: Transaction, old: Container) -> None:
        """Remove the record of a container of which nothing is left.

        FailedPrecondition if it has children, or is not as it was read any more.
        """
        if CONTAINERS.get(txn, self._namespace, old.id) != old:
            raise FailedPrecondition(f"container {old.id} was changed meanwhile; try again")
        children = (kin.child for kin in KIN.survey(txn, self._namespace, old.id)[0])
        if any(CONTAINERS.any(txn, self._namespace, child) for child in children):
            raise FailedPrecondition(f"container {old.id} has children; remove those first")
        KIN.clear(txn, self._namespace, old.id)
        CONTAINERS.delete(txn, self._namespace, old.id)
        if old.parent:
            KIN.delete(txn, self._namespace, old.parent, old.id)

    def children(self, name: str) -> list[str]:
        """Return the IDs of the containers whose parent is `name`."""
        with self._meta.read() as txn:
            return [kin.child for kin in KIN.survey(txn, self._namespace, name)[0]]
