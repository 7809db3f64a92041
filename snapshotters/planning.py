"""Works out what there is to seal for the steps of a commit, and on what each of them will stand.

Sync; safe from any thread. Looks only: what is wrong with a step is found out before anything is done.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine import labels as label_rules
from engine.errors import EngineError, InvalidArgument
from engine.kv.schema import Snapshot
from engine.metadata.lineage import MetaStore
from engine.snapshots import Capabilities, Commit
from snapshotters.folder_sink import OUTLINE
from snapshotters.sealing import Seal, load_sealed

__all__ = ["Planner"]


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans the commits of one backend in one namespace."""

    store: MetaStore
    folder: Path
    name: str
    capabilities: Capabilities
    settle: str
    """The name of what settles applied layers (`snapshotters.sealing.Settle`)."""

    def checked(self, steps: Sequence[Commit]) -> Iterator[tuple[Commit, Snapshot, list[Snapshot]]]:
        """Yield each step, its record and what it will stand on, nearest first; raise as `commit`."""
        chains: dict[str, list[Snapshot]] = {}
        for step in steps:
            # The parent may be a step before this one, which the store does not know yet.
            label_rules.check(step.labels)
            under = chains.get(step.parent or "")
            record, parent = self.store.check_commit(step.name, step.key, None if under else step.parent)
            if step.parent and not (record.parent or self.capabilities.rebase):
                raise InvalidArgument(f"{self.name} cannot rebase: prepare {step.key} on its parent")
            if under is None:
                under = [self.store.get(parent), *self.store.parents(parent)] if parent else []
            self.capabilities.check_layers(self.name, len(under) + 1)
            chains[step.name] = [self._laid(record), *under]
            yield step, record, under

    def _laid(self, record: Snapshot) -> Snapshot:
        """Return a record as it will be of a snapshot that is sealed."""
        settled = load_sealed(self._place(record)) if record.layer else None
        number = settled.folder if settled else record.id
        return msgspec.structs.replace(record, id=number)

    def seals(self, steps: Sequence[Commit], *, flush: bool) -> list[Seal]:
        """Return what is to be sealed for some steps, up to the first that `commit` will refuse."""
        found: list[Seal] = []
        notes = self.store.unflushed() if flush else 0
        with suppress(EngineError):  # `commit` says what is wrong with a step
            for step, record, below in self.checked(steps):
                if load_sealed(self._place(record)) is None or self._is_whole(record, below):
                    _add(found, self.seal(step, record, below))
        return [msgspec.structs.replace(one, flush=flush, notes=notes) for one in found]

    def seal(self, step: Commit, record: Snapshot, below: Sequence[Snapshot]) -> Seal:
        """Return the sealing of one step alone, which will stand on `below`, nearest first."""
        return Seal(
            settle=self.settle,
            folder=str(self.folder),
            below=[lower.id for lower in below],
            layers=[record.id],
            twins=[record.layer],
            parents=[step.parent or record.parent],
            is_whole=self._is_whole(record, below),
        )

    def _is_whole(self, record: Snapshot, below: Sequence[Snapshot]) -> bool:
        """Say whether a snapshot was written through a mount, on top of `below`."""
        has_outline = bool(record.layer) or (self._place(record) / OUTLINE).exists()
        return not has_outline and bool(record.parent or not below)

    def _place(self, record: Snapshot) -> Path:
        return self.folder / str(record.id)


def _add(seals: list[Seal], one: Seal) -> None:
    """Add the sealing of one step to the last of `seals` if it stands on that, else as a new one."""
    if seals and not one.is_whole and not seals[-1].is_whole and one.below[:1] == seals[-1].layers[-1:]:
        seals[-1].layers.extend(one.layers)
        seals[-1].twins.extend(one.twins)
        seals[-1].parents.extend(one.parents)
    else:
        seals.append(one)
