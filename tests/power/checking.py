"""Opens what a power cut left, and holds it against what was committed.

Sync.
"""

import hashlib
import shutil
from pathlib import Path

from lmdb import verify

from engine.kv.environment import Environment
from engine.kv.schema import BLOBS, EXTENT, Blob
from engine.root import Root
from engine.stores import Stores
from tests.conftest import AMD64
from tests.power.disk import Cut
from tests.power.trace import FILES, Recorded
from tests.power.workload import State, content_of

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
            if at not in self._sound:
                _assert_whole(self._states["m"][at[0]], self._states["b"][at[1]])
                self._sound.add(at)
            if cut.number % _GO_ON_EVERY == 0:
                _go_on(root)
        if cut.number % _GO_ON_EVERY == 0:
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


def _assert_whole(meta: State, blobs: State) -> None:
    """Hold the records of one file against the bytes of the other."""
    for raw in meta[BLOBS.name].values():
        blob: Blob = BLOBS._decode(raw)
        number = blob.number.to_bytes(8, "big")
        count = -(-blob.size // EXTENT)
        data = b"".join(blobs[""].get(number + i.to_bytes(4, "big"), b"") for i in range(count))
        kind, _, expected = blob.digest.partition(":")
        assert hashlib.new(kind, data).hexdigest() == expected, f"{blob.digest} is not what it was"


def _go_on(root: Root) -> None:
    """Collect, and write: the lists of free pages have to be right too."""
    stores = Stores(root, "default", AMD64)
    try:
        stores.collect()
        for number in range(3):
            with stores.content.ingest(f"more {number}", lease="") as writer:
                writer.write(bytes([number]) * 700_000)
                writer.commit()
        for blob in stores.content.walk():
            stores.content.verify(blob.digest)
    finally:
        stores.close()
