"""What a store does before the power goes: some of everything, and the states that it committed.

Sync. Run by strace as `python -m tests.power.workload ROOT FOLDER SEED`. After each commit a letter is
written to FOLDER/commits, so that the trace tells which were acknowledged; FOLDER/states has, by letter,
what the file held before the first and after each.
"""

import os
import pickle
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from engine.errors import AlreadyExists, NotFound
from engine.kv.environment import Environment, Transaction
from engine.metadata.leases import leased
from engine.oci.digest import Digest, digest_of
from engine.root import Root
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from tests.conftest import AMD64
from tests.engine.image_files import import_image

__all__ = ["State", "content_of"]

State = dict[str, dict[bytes, bytes]]
"""Records by table; "" is the one table of a file without names."""


def content_of(environment: Environment, txn: Transaction) -> State:
    """Return all that a file holds."""
    found: State = {}
    for name, table in [*txn.databases.items()] or [("", None)]:
        with txn.raw.cursor(db=table) as cursor:
            found[name] = {bytes(key): bytes(value) for key, value in cursor}
    return found


class _Recorder:
    """Notes each commit of each file."""

    def __init__(self, folder: Path) -> None:
        self._commits = os.open(folder / "commits", os.O_WRONLY | os.O_CREAT, 0o600)
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._values: dict[bytes, bytes] = {}
        self.states: dict[str, list[State]] = defaultdict(list)

    def note(self, environment: Environment, txn: Transaction) -> str:
        letter = environment.path.name[0]
        found = content_of(environment, txn)
        # The same bytes are the same object in all states: that is how few are written down.
        shared = self._values.setdefault
        self.states[letter].append(
            {name: {k: shared(v, v) for k, v in rows.items()} for name, rows in found.items()}
        )
        return letter

    def as_method(self) -> Callable[[Environment], AbstractContextManager[Transaction]]:
        return lambda environment: self._writing(environment)  # noqa: PLW0108  a bound one is no method

    @contextmanager
    def _writing(self, environment: Environment) -> Iterator[Transaction]:
        with self._locks[environment.path.name]:
            with _write(environment) as txn:
                yield txn
                letter = self.note(environment, txn)
            os.write(self._commits, letter.encode())


_write = Environment.write


def _put(stores: Stores, data: bytes, lease: str = "") -> Digest:
    with stores.content.ingest(digest_of(data), lease=lease) as writer:
        writer.write(data)
        writer.commit()
    return digest_of(data)


def _work(stores: Stores, folder: Path, source: random.Random) -> None:
    """Import, label, remove, collect, give back, go on with what was begun: in an order of its own."""
    files = [member("file", data=source.randbytes(size)) for size in (1_300_000, 700_000)]
    layers = [archive(file) for file in files]
    image = layout(folder / "image", layers)
    name = "example.org/image:1"
    (named,) = import_image(stores, image, name=name)
    stores.images.put_all({"example.org/other:1": named.target})
    with leased(stores.root.meta, "default") as lease:
        sizes = [10, 3000, 30_000, 100_000]
        blobs = [_put(stores, source.randbytes(source.choice(sizes)), lease) for _ in range(6)]
        for blob in blobs[:3]:
            stores.content.update(blob, {"containerd.io/gc.root": "yes", "of": "a label" * 20})
        begun = source.randbytes(1_500_000)
        with stores.content.ingest("begun", lease=lease) as writer:
            writer.write(begun[:1_400_000])
        with stores.content.ingest("begun", lease=lease) as writer:
            writer.write(begun[writer.offset :])
            writer.commit()
        stores.content.delete(blobs[4])
        stores.content.cleanup()
    stores.images.remove("example.org/other:1", name)
    stores.collect()
    steps = [
        lambda: _put(stores, source.randbytes(source.choice([100, 5000, 400_000, 1_200_000]))),
        stores.collect,
        lambda: stores.content.update(blobs[0], {"of": "x" * source.randrange(3000)}),
        lambda: import_image(stores, image, name=name),
        lambda: stores.images.remove(name),
    ]
    for _ in range(10):
        try:
            source.choice(steps)()
        except (AlreadyExists, NotFound):
            pass  # it was done before


def main(root: Path, folder: Path, seed: str) -> None:
    """Do it, and write down what was committed."""
    with Root(root) as opened:
        assert opened.owners.me
        recorder = _Recorder(folder)
        for environment in (opened.meta, opened.blobs):
            with environment.read() as txn:
                recorder.note(environment, txn)
        Environment.write = recorder.as_method()  # type: ignore[method-assign]
        stores = Stores(opened, "default", AMD64)
        _work(stores, folder, random.Random(seed))
        stores.close()
    (folder / "states").write_bytes(pickle.dumps(dict(recorder.states)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
