"""What the record of a container goes through, with what it holds: images, mounts, a lease.

Sync; safe from any thread and process. Each step is one transaction, so that a crash is before it or
after it. Whoever makes, mends or removes a container holds it by a lease of his process, which is in its
record; of a container whose record somebody else moved meanwhile no step succeeds any more.

    begin, hold      the record; then references to its images and the claims of its mounts
    settle           it is mounted
    resume           what vanished is to be mounted again
    removing         it is `destroying`: who works on it is told so, and nobody else begins
    failed, gone     it stays for another try; nothing is left of it
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from engine.errors import FailedPrecondition, NotFound
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import CONTAINERS, MOUNTS, SNAPSHOTS, Container, MountRecord
from engine.metadata import ledger
from engine.metadata.containers import ContainerState, ContainerStore, check_follows, entered
from engine.metadata.leases import begin
from engine.metadata.nodes import LEASE, Node, snapshot_node
from engine.metadata.references import CONTAINER, ReferenceStore

__all__ = ["HeldRoot", "IsMeant", "ProvisionStore", "Removing", "Settled", "anyone"]

IsMeant = Callable[[Container, bool], bool]
"""Says of a container as it is, and of whether somebody works on it, whether it is meant."""


def anyone(_container: Container, _is_held: bool) -> bool:
    """Mean a container however it is."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRoot:
    """An image that is to be mounted, and the claim of that mount."""

    mount: MountRecord
    config: str
    """The digest of the image's config."""
    target: str
    """What the image's name meant, by digest."""


@dataclass(frozen=True, slots=True)
class Removing:
    """A container that is on its way out, and who has to remove it."""

    container: Container
    is_mine: bool
    """Whether the caller has to."""
    was_asked: bool
    """Whether it was on its way out before."""


Settled = tuple[Container, Sequence[MountRecord], Mapping[str, object]]
"""A container that is mounted, the records of what was mounted, and what else is to be changed of it."""


class ProvisionStore:
    """The containers of one namespace as they are made and removed."""

    def __init__(
        self,
        meta: Environment,
        namespace: str,
        containers: ContainerStore,
        references: ReferenceStore,
    ) -> None:
        self._meta = meta
        self._namespace = namespace
        self._containers = containers
        self._references = references

    # -- making -------------------------------------------------------------------------------

    def begin(self, container: Container, roots: Sequence[HeldRoot]) -> tuple[Container, bool]:
        """Put the record of a new container, held by the caller, and hold the images of its roots.

        Return it, and whether those are here still: else nothing of them is held. AlreadyExists if there
        is one of that ID; NotFound, FailedPrecondition for its parent.
        """
        with self._meta.write() as txn:
            lease = begin(txn, self._namespace, self._meta.owners.me)
            is_here = bool(roots) and self._are_here(txn, roots)
            mine = msgspec.structs.replace(container, lease=lease)
            if is_here:
                mine = self._hold(txn, mine, roots)
            self._containers.put_new(txn, mine)
        return mine, is_here

    def hold(self, mine: Container, roots: Sequence[HeldRoot]) -> Container:
        """Hold the images of a container that was begun without; return its record.

        NotFound if one went meanwhile, FailedPrecondition if somebody moved the container.
        """
        with self._meta.write() as txn:
            self._check(txn, mine)
            if not self._are_here(txn, roots):
                raise NotFound(f"an image of container {mine.id} was removed meanwhile; try again")
            changed = self._hold(txn, mine, roots)
            CONTAINERS.put(txn, changed, self._namespace, mine.id)
        return changed

    def _are_here(self, txn: Transaction, roots: Iterable[HeldRoot]) -> bool:
        return all(
            self._references.is_here(txn, root.target)
            and (
                not root.mount.top
                or SNAPSHOTS.any(txn, root.mount.backend, self._namespace, root.mount.top)
            )
            for root in roots
        )

    def _hold(self, txn: Transaction, mine: Container, roots: Sequence[HeldRoot]) -> Container:
        for root in roots:
            mount = root.mount
            self._references.put(txn, CONTAINER + mine.id, root.config, root.target, mount.image)
            if mount.top:  # until a snapshot stands on it; not all that has it need have unpacked it
                top = snapshot_node(mount.backend, mount.top)
                ledger.pin(txn, self._namespace, mine.lease, top)
            self._put_mount(txn, mount, lease=mine.lease)
        own = roots[0]
        return msgspec.structs.replace(mine, target=own.target, config=own.config, top=own.mount.top)

    def settle(self, mine: Container, mounts: Iterable[MountRecord], **changes: object) -> Container:
        """Note that a container is mounted, and let go of it; return its record.

        FailedPrecondition if somebody moved it meanwhile.
        """
        with self._meta.write() as txn:
            self._check(txn, mine)
            return self._settle(txn, mine, mounts, changes)

    def settle_all(self, settled: Iterable[Settled]) -> None:
        """Do what `settle` does for many; those that somebody moved meanwhile are only let go of."""
        with self._meta.write() as txn:
            for mine, mounts, changes in settled:
                if CONTAINERS.get(txn, self._namespace, mine.id) == mine:
                    self._settle(txn, mine, mounts, changes)
                else:
                    self._leave(txn, mine)

    def _settle(
        self,
        txn: Transaction,
        mine: Container,
        mounts: Iterable[MountRecord],
        changes: Mapping[str, object],
    ) -> Container:
        done = msgspec.structs.replace(mine, lease="", **changes)
        if mine.state == ContainerState.PROVISIONING:
            done = entered(done, ContainerState.PROVISIONED)
        CONTAINERS.put(txn, done, self._namespace, mine.id)
        for mount in mounts:
            self._put_mount(txn, mount, lease="")
        self._end(txn, mine.lease)
        return done

    def resume(self, *olds: Container) -> list[Container]:
        """Hold containers to mend or change them; return the records of those that are held.

        Which are not as they were read any more, or held by somebody, are left out.
        """
        held: list[Container] = []
        with self._meta.write() as txn:
            for old in olds:
                is_same = CONTAINERS.get(txn, self._namespace, old.id) == old
                if is_same and not self._containers.is_held_in(txn, old):
                    self._end(txn, old.lease)
                    lease = begin(txn, self._namespace, self._meta.owners.me)
                    held.append(msgspec.structs.replace(old, lease=lease))
                    CONTAINERS.put(txn, held[-1], self._namespace, old.id)
        return held

    def leave(self, *mine: Container) -> None:
        """Let go of containers in the state that they are in, whoever moved them."""
        if mine:
            with self._meta.write() as txn:
                for container in mine:
                    self._leave(txn, container)

    def _leave(self, txn: Transaction, mine: Container) -> None:
        found = CONTAINERS.get(txn, self._namespace, mine.id)
        if found is not None and found.lease == mine.lease:
            left = msgspec.structs.replace(found, lease="")
            CONTAINERS.put(txn, left, self._namespace, mine.id)
        self._end(txn, mine.lease)

    # -- removing -----------------------------------------------------------------------------

    def removing(self, name: str, *, mine: str = "", is_meant: IsMeant = anyone) -> Removing | None:
        """Have a container be on its way out; None if there is none that is meant.

        It is the caller's to remove if nobody holds it, or he does, by the lease `mine`; else whoever
        does finds it moved.
        """
        with self._meta.write() as txn:
            old = CONTAINERS.get(txn, self._namespace, name)
            if old is None:
                return None
            is_mine = bool(mine) and old.lease == mine
            is_free = not self._containers.is_held_in(txn, old)
            if not is_meant(old, not is_free):
                return None
            lease = old.lease
            if is_free:
                self._end(txn, old.lease)  # of who died over it
                lease = begin(txn, self._namespace, self._meta.owners.me)
            moved = old
            if old.state != ContainerState.DESTROYING:
                check_follows(old, ContainerState.DESTROYING)
                moved = entered(old, ContainerState.DESTROYING)
            moved = msgspec.structs.replace(moved, lease=lease)
            if moved != old:
                CONTAINERS.put(txn, moved, self._namespace, name)
        return Removing(moved, is_free or is_mine, old.state == ContainerState.DESTROYING)

    def failed(self, mine: Container, why: str) -> None:
        """Note that removing a container failed, and let go of it."""
        with self._meta.write() as txn:
            if CONTAINERS.get(txn, self._namespace, mine.id) == mine:
                left = msgspec.structs.replace(mine, errors=mine.errors + 1, error=why, lease="")
                CONTAINERS.put(txn, left, self._namespace, mine.id)
            self._end(txn, mine.lease)

    def gone(self, mine: Container, mounts: Iterable[str]) -> None:
        """Remove the record of a container of which nothing is left, its mounts' and its references.

        FailedPrecondition if it has children by now.
        """
        with self._meta.write() as txn:
            for key in mounts:
                MOUNTS.delete(txn, self._namespace, key)
            self._references.drop(txn, CONTAINER + mine.id)
            self._containers.drop(txn, mine)
            self._end(txn, mine.lease)

    # -- in a transaction ---------------------------------------------------------------------

    def _check(self, txn: Transaction, mine: Container) -> None:
        if CONTAINERS.get(txn, self._namespace, mine.id) != mine:
            raise FailedPrecondition(f"container {mine.id} was changed meanwhile; try again")

    def _put_mount(self, txn: Transaction, mount: MountRecord, *, lease: str) -> None:
        MOUNTS.put(txn, msgspec.structs.replace(mount, lease=lease), self._namespace, mount.key)

    def _end(self, txn: Transaction, lease: str) -> None:
        if lease:  # it holds the topmost layers of some images, at most
            ledger.drop(txn, self._namespace, Node(LEASE, "", lease))
