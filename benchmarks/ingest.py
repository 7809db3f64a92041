"""`python -m benchmarks ingest`: how fast blobs come into a store, and out of it, beside plain files.

Each pair is timed in turn, each time on a file system that is new and in memory; what is compared is the
ratio of medians. Needs root, and mkfs.ext4 and mkfs.xfs. Exits 1 if a ratio is below its target.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.fresh import KINDS, fresh_file_system
from engine.content.growing import BATCH
from engine.content.store import ContentStore
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores

_BIG = 1 << 30
_SMALL, _COUNT = 4096, 10_000


@dataclass(frozen=True)
class Pair:
    """One figure: what is compared with what, and the ratio that it should reach."""

    name: str
    ours: Callable[[Path], float]
    theirs: Callable[[Path], float]
    target: float


@dataclass(frozen=True)
class Figure:
    """Medians in seconds."""

    name: str
    file_system: str
    ours: float
    theirs: float
    target: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the other one ours is."""
        return self.theirs / self.ours


def main(arguments: Sequence[str]) -> int:
    """Measure what the options ask for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ingest", description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--file-systems", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", choices=[pair.name for pair in _PAIRS])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    figures = [
        _measured(pair, kind, options.runs)
        for pair in _PAIRS
        if not options.only or pair.name in options.only
        for kind in options.file_systems
    ]
    for figure in figures:
        print(
            f"{figure.name} on {figure.file_system}: {figure.ours:.3f} s, beside {figure.theirs:.3f} s: "
            f"{figure.ratio:.2f} times as fast (target {figure.target})"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(f) | {"ratio": f.ratio} for f in figures], indent=1))
    return int(any(figure.ratio < figure.target for figure in figures))


def _measured(pair: Pair, kind: str, runs: int) -> Figure:
    ours, theirs = [], []
    for _ in range(runs):
        for times, run in ((theirs, pair.theirs), (ours, pair.ours)):
            with fresh_file_system(kind) as folder:
                times.append(run(folder))
        print(f"{pair.name}, {kind}: {ours[-1]:.3f} s, {theirs[-1]:.3f} s", file=sys.stderr)
    return Figure(pair.name, kind, median(ours), median(theirs), pair.target)


@contextmanager
def _content(folder: Path) -> Iterator[ContentStore]:
    with Root(folder / "root") as root:
        yield Stores(root, "default", Platform()).content


def _seconds(run: Callable[[], object]) -> float:
    start = time.monotonic()
    run()
    return time.monotonic() - start


# -- one large blob -----------------------------------------------------------------------------

_PIECE = os.urandom(BATCH)


def _pieces() -> Iterator[memoryview]:
    for start in range(0, _BIG, BATCH):
        yield memoryview(_PIECE)[: _BIG - start]


def _big_blob(folder: Path) -> float:
    with _content(folder) as content:
        return _seconds(lambda: _put(content, "big", _pieces(), _BIG))


def _put(content: ContentStore, ref: str, pieces: Iterator[memoryview], size: int) -> None:
    with content.ingest(ref, lease="", total=size) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.commit()


def _big_file(folder: Path) -> float:
    def write() -> None:
        with open(folder / "big", "xb", buffering=0) as file:
            for piece in _pieces():
                assert file.write(piece) == len(piece)
            os.fsync(file.fileno())

    return _seconds(write)


# -- many small ones ----------------------------------------------------------------------------


def _small_bytes() -> Iterator[bytes]:
    return (number.to_bytes(8, "big") * (_SMALL // 8) for number in range(_COUNT))


def _small_blobs(folder: Path) -> float:
    with _content(folder) as content:

        def write() -> None:
            for data in _small_bytes():
                digest = digest_of(data)
                with content.ingest(digest, lease="", expected=digest, total=_SMALL) as writer:
                    writer.write(data)
                    writer.commit()

        return _seconds(write)


def _small_files(folder: Path) -> float:
    """Do what containerd does for each blob, less its files beside the data."""
    (folder / "ingest").mkdir()
    (folder / "blobs").mkdir()

    def write() -> None:
        for data in _small_bytes():
            name = hashlib.sha256(data).hexdigest()
            with open(folder / "ingest" / name, "xb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
            os.rename(folder / "ingest" / name, folder / "blobs" / name)
            place = os.open(folder / "blobs", os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(place)
            os.close(place)

    return _seconds(write)


# -- out again ----------------------------------------------------------------------------------


def _hashed_blob(folder: Path) -> float:
    with _content(folder) as content:
        with content.ingest("big", lease="", total=_BIG) as writer:
            for piece in _pieces():
                writer.write(piece)
            digest = writer.commit().digest
        return _seconds(lambda: content.verify(digest))


def _hashed_memory(folder: Path) -> float:
    """Hash as many bytes as the blob has, which lie in memory."""
    data = bytearray().join(_pieces())
    return _seconds(lambda: hashlib.sha256(data))


_PAIRS = (
    Pair("ingest-big", _big_blob, _big_file, 0.9),
    Pair("ingest-small", _small_blobs, _small_files, 2.0),
    Pair("hash", _hashed_blob, _hashed_memory, 0.95),
)
