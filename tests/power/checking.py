"""Opens what a power cut left, and holds it against what was committed.

Sync.
"""

import shutil
from pathlib import Path

from lmdb import verify

from engine.kv.environment import Environment
from engine.root import Root
from engine.stores import Stores, open_stores
from tests.conftest import AMD64
from tests.power.disk import Cut
from tests.power.trace import FILES, Recorded
from tests.power.workload import content_of

__all__ = ["Checker"]

_GO_ON_EVERY = 16  # images in which work goes on


class Checker:
    """Checks one image after the other in a folder of its own."""

    def __init__(self, recorded: Recorded, folder: Path) -> None:
        self._states = recorded.states
        self._root = folder / "cut"
        shutil.copytree(recorded.root, self._root)
        self._sound: set[tuple[int, int]] = set()

    def check(self, cut: Cut) -> None:
        """Raise AssertionError if anything that was committed is lost, or anything is there by half.

        What was acknowledged is there. What was not is there or not, but as a whole.
        """
        for name, data in cut.files.items():
            file = self._root / FILES[name] / "data.mdb"
            file.write_bytes(data)
            assert verify.verify(str(file)) == []
        with Root(self._root) as root:
            at = self._which(cut, root.meta), self._which(cut, root.blobs)
        goes_on = cut.number % _GO_ON_EVERY == 0
        if goes_on or at not in self._sound:
            self._sound.add(at)
            with open_stores(self._root, "default", AMD64) as stores:
                _assert_whole(stores)
                if goes_on:
                    _go_on(stores)
        if goes_on:
            for name in FILES.values():
                assert verify.verify(str(self._root / name / "data.mdb")) == []

    def _which(self, cut: Cut, file: Environment) -> int:
        """Return which of the committed states a file has."""
        name = file.path.name[0]
        with file.read() as txn:
            found = content_of(file, txn)
        last = cut.acknowledged[name]
        for number in (last, last + 1):  # the one that was under way may have been done
            if number < len(self._states[name]) and found == self._states[name][number]:
                return number
        for number, state in enumerate(self._states[name]):
            assert found != state, f"{file.path.name} has state {number}, but {last} was acknowledged"
        raise AssertionError(f"{file.path.name} has a state that was never committed")


def _assert_whole(stores: Stores) -> None:
    """Hold the records of one file against the bytes of the other, and each against itself."""
    checked = stores.check()
    assert not [finding for finding in checked.findings if finding.is_damage]
    assert checked.counts.blobs == sum(1 for _ in stores.content.walk())


def _go_on(stores: Stores) -> None:
    """Collect, and write: the lists of free pages have to be right too."""
    stores.collect()
    for number in range(3):
        with stores.content.ingest(f"more {number}", lease="") as writer:
            writer.write(bytes([number]) * 700_000)
            writer.commit()
    _assert_whole(stores)
