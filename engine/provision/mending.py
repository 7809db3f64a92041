"""Mounts again what containers have and is not mounted any more: after a reboot, or an umount by hand.

Sync; safe from any thread and process. For many at once, as each transaction waits for the disk.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from engine.errors import EngineError
from engine.kv.schema import Container, MountRecord, now
from engine.metadata.containers import ON_THE_WAY, ContainerState
from engine.processes import boot_id
from engine.provision.rootfs import RootFileSystems, Sight
from engine.stores import Stores

__all__ = ["Mender"]

_BATCH = 100  # containers that are held at once: a tenth of a second


class Mender:
    """Mends the containers of some stores."""

    def __init__(self, stores: Stores, roots: RootFileSystems) -> None:
        self._containers = stores.containers
        self._provisions = stores.provisions
        self._roots = roots

    def mend(self, containers: Iterable[Container]) -> dict[str, EngineError]:
        """Mount what is not mounted, and note what ran in another boot as stopped; return what failed.

        What somebody works on, or is on its way out, is not looked at. Each stands by itself.
        """
        sight = Sight()
        failed: dict[str, EngineError] = {}
        broken = (container for container in containers if self._is_broken(container))
        while some := list(islice(broken, _BATCH)):
            mended = []
            mine = self._provisions.resume(*some)
            try:
                for container in mine:
                    try:
                        mended.append((container, self._roots.restore(container, sight)))
                    except EngineError as error:
                        failed[container.id] = error
                self._provisions.settle_all(_settled(mended))
            finally:
                done = {container.id for container, _ in mended}
                self._provisions.leave(*(one for one in mine if one.id not in done))
        return failed

    def _is_broken(self, container: Container) -> bool:
        if container.state in ON_THE_WAY or self._containers.is_held(container):
            return False
        return not self._roots.is_whole(container)


def _settled(
    mended: Sequence[tuple[Container, Sequence[MountRecord]]],
) -> Iterator[tuple[Container, Sequence[MountRecord], dict[str, object]]]:
    boot = boot_id()
    for container, mounts in mended:
        changes: dict[str, object] = {}
        if container.boot != boot:
            changes["boot"] = boot
            if container.state in {ContainerState.STARTING, ContainerState.RUNNING}:
                stopped = str(ContainerState.STOPPED)
                changes |= {"state": stopped, "since": {**container.since, stopped: now()}, "pid": 0}
        yield container, mounts, changes
