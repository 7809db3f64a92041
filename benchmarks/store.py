"""What a large store costs: `python -m benchmarks store`, beside the targets that it is held to.

A store of 1,000,000 blobs, 100,000 snapshots and 10,000 images (`many`), a tenth of it garbage, on
a fresh ext4 in memory. What one image costs is compared with a store of ten images of the same form.
Needs root. A process's own memory is told apart from what it has mapped, which is the store's file: the
kernel's cache of it, which goes when someone needs the room.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from statistics import median

from benchmarks.contenders import LAMINA
from benchmarks.fresh import fresh_file_system
from benchmarks.many import BACKEND, NAMESPACE, Shape, base_layer, fill, image_name
from engine.accounting import Accounts
from engine.kv.schema import Lease, now
from engine.metadata import ledger
from engine.oci.digest import digest_of
from engine.snapshots import Kind
from engine.stores import Stores, host_platform, open_stores

__all__ = ["main"]

_ROUNDS = 30
_PAUSE = 0.002  # between two calls of the other process: it has its own work to do


@dataclass(frozen=True)
class Figure:
    """A measured value, and what it may be at most."""

    name: str
    value: float
    unit: str
    most: float | None = None

    @property
    def misses(self) -> bool:
        """Whether it is more than it may be."""
        return self.most is not None and self.value > self.most

    def __str__(self) -> str:
        bound = "" if self.most is None else f"at most {self.most:g}"
        return f"{'!' if self.misses else ' '} {self.value:9.3f} {self.unit:<3} {bound:<14} {self.name}"


Figures = Iterator[Figure]


@dataclass(frozen=True)
class Place:
    """Where a filled store is, and its form."""

    root: Path
    shape: Shape

    @contextmanager
    def opened(self) -> Iterator[Stores]:
        """Open it in this process."""
        with open_stores(self.root, NAMESPACE, host_platform()) as stores:
            yield stores

    def command(self, *words: str) -> list[str]:
        """Return a command line on it."""
        return [*LAMINA, "--root", str(self.root), *words]


# -- what a command costs -----------------------------------------------------------------------


_WATCHER = """
import os, re, sys, time
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
own, ended = 0, 0
while not ended:
    with open(f"/proc/{child}/status") as about:
        own = max([own, *map(int, re.findall(r"RssAnon:\\s+([0-9]+) kB", about.read()))])
    time.sleep(0.02)
    ended, status, usage = os.wait4(child, os.WNOHANG)
told = f"{own} {usage.ru_maxrss} {usage.ru_utime + usage.ru_stime}"
os.write(int(sys.argv[1]), told.encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Watched:
    """A command under way, and in the end what it took."""

    def __init__(self, command: Sequence[str]) -> None:
        # By way of a small process: a new one begins with the peak of whoever started it (getrusage(2)).
        self._result, result = os.pipe()
        watcher = [sys.executable, "-I", "-S", "-c", _WATCHER, str(result), *command]
        self.process = subprocess.Popen(watcher, stdout=subprocess.PIPE, pass_fds=[result])
        os.close(result)

    def lines(self) -> Iterator[bytes]:
        """Yield what it writes."""
        assert self.process.stdout
        with self.process.stdout as lines:
            yield from lines

    def cost(self, name: str, most: float | None = None) -> Figures:
        """Tell its time on a processor and its peak, once it ends. CalledProcessError if it failed."""
        with open(self._result, encoding="ascii") as result:
            told = result.read()
        if self.process.wait():
            raise subprocess.CalledProcessError(self.process.returncode, self.process.args)
        own, peak, busy = told.split()
        yield Figure(f"{name}: on a processor", float(busy), "s")
        yield Figure(f"{name}: memory of its own", int(own) * 1024 / 1e6, "MB", most)
        yield Figure(f"{name}: and what it has mapped", int(peak) * 1024 / 1e6, "MB")


def opening(place: Place) -> Figures:
    """Open the store to write, which is more than to read."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with place.opened():
            times.append(time.perf_counter() - start)
    yield Figure("open", median(times), "s", 0.2)


def listing(place: Place, words: Sequence[str], first: float | None = None) -> Figures:
    """List into a pipe: the first line, as whoever waits for it sees it, then all of them."""
    start = time.perf_counter()
    command = Watched(place.command(*words))
    lines = command.lines()
    next(lines)
    yield Figure(f"{' '.join(words)}: first line", time.perf_counter() - start, "s", first)
    for _ in lines:
        pass
    yield Figure(f"{' '.join(words)}: all", time.perf_counter() - start, "s")
    yield from command.cost(" ".join(words))


def collection(place: Place) -> Figures:
    """Collect the garbage while this process prepares snapshots and sets labels."""
    with place.opened() as stores:
        yield from _waits("waiting for nobody", _disturb(stores, range(_ROUNDS * 10)))
        start = time.perf_counter()
        command = Watched(place.command("gc", "-q"))
        waits = _disturb(stores, takewhile(lambda _: command.process.poll() is None, count()))
        seconds = time.perf_counter() - start
    yield Figure("gc", seconds, "s", 15)
    yield from command.cost("gc", 600)
    yield from _waits("while gc runs", waits, most_ms=20)


def _disturb(stores: Stores, rounds: Iterable[int]) -> dict[str, list[float]]:
    """Prepare a snapshot and set a label in turn; return how long each took, in ms."""
    snapshotter, blob = stores.snapshotter(BACKEND), base_layer()
    parent = next(
        info.key for info in snapshotter.walk() if info.kind is Kind.COMMITTED and not info.parent
    )
    waits: dict[str, list[float]] = {"prepare": [], "label": []}
    for number in rounds:
        key = f"bench {number}"
        start = time.perf_counter()
        snapshotter.prepare(key, parent)
        waits["prepare"].append((time.perf_counter() - start) * 1e3)
        snapshotter.cleanup(only={snapshotter.remove(key)})
        start = time.perf_counter()
        stores.content.update(blob, {"bench": str(number)})
        waits["label"].append((time.perf_counter() - start) * 1e3)
        time.sleep(_PAUSE)
    return waits


def _waits(when: str, waits: dict[str, list[float]], most_ms: float | None = None) -> Figures:
    for what, times in waits.items():
        ranked = sorted(times)
        yield Figure(f"{what}, {when} ({len(ranked)} times): median", median(ranked), "ms")
        yield Figure(f"{what}, {when}: 99 %", ranked[len(ranked) * 99 // 100], "ms", most_ms)
        yield Figure(f"{what}, {when}: longest", ranked[-1], "ms")


# -- what one image costs -----------------------------------------------------------------------


def _inspecting(stores: Stores, number: int) -> Callable[[], None]:
    """Resolve one image and look at all that it is made of."""

    def inspect() -> None:
        image = stores.resolve(stores.images.get(image_name(number)).target)
        stores.check_complete(image)
        stores.unpacked_into(image)

    return inspect


def _accounting(stores: Stores, number: int) -> Callable[[], None]:
    """Find out what removing one image would free."""
    accounts = Accounts(stores.root, NAMESPACE, ())
    image = stores.images.get(image_name(number))

    def account() -> None:
        accounts.image(image)

    return account


def _giving_up(stores: Stores, number: int) -> Callable[[], None]:
    """Give up an import that stored some blobs and found the layer that all images share."""
    lease = Lease(id=f"bench {number}", created=now(), owner=stores.root.owners.me)
    with stores.root.meta.write() as txn:
        ledger.put(txn, NAMESPACE, lease)
    for part in range(5):
        data = f"{number} {part} of a failed import".encode()
        digest = digest_of(data)
        with stores.content.ingest(digest, lease=lease.id, expected=digest, total=len(data)) as writer:
            writer.write(data)
            writer.commit()
    stores.content.pin([base_layer()], lease.id)
    return lambda: stores.give_up(lease.id, seconds=60)


def _ratio(
    name: str, each: Callable[[Stores, int], Callable[[], None]], large: Place, small: Place
) -> Figures:
    """Do the same in both stores by turns, so that a slow moment of the machine hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    with small.opened() as here, large.opened() as there:
        for number in range(_ROUNDS):
            # An image after the other, each one the second time: as often as in a store of ten.
            runs = [each(stores, number // 2 % 10) for stores in (here, there)]
            for run, spent in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                spent.append(time.perf_counter() - start)
    few, many = (median(spent[1::2]) * 1e3 for spent in times)
    yield Figure(f"{name}: in ten images", few, "ms")
    yield Figure(f"{name}: in the large store", many, "ms")
    yield Figure(f"{name}: ratio", many / few, "", 1.5)


def one_image(large: Place, small: Place) -> Figures:
    """Compare what one image costs in a large store with what it costs in a small one."""
    yield from _ratio("inspecting an image", _inspecting, large, small)
    yield from _ratio("who holds an image's parts", _accounting, large, small)
    yield from _ratio("giving up an import", _giving_up, large, small)


# -- all of it ----------------------------------------------------------------------------------


def sections(large: Place, small: Place) -> Mapping[str, Callable[[], Figures]]:
    """Return what there is to measure; the collection comes last, for it takes the garbage away."""
    return {
        "open": lambda: opening(large),
        "images": lambda: listing(large, ["images"], 0.5),
        "content": lambda: listing(large, ["content", "ls"]),
        "snapshots": lambda: listing(large, ["snapshots", "ls"]),
        "image": lambda: one_image(large, small),
        "du": lambda: listing(large, ["du"]),
        "gc": lambda: collection(large),
    }


def _filled(root: Path, shape: Shape) -> Place:
    place = Place(root, shape)
    if not (root / "format").exists():
        start = time.perf_counter()
        with place.opened() as stores:
            fill(stores, shape)
        print(f"  {time.perf_counter() - start:9.3f} s   to make {shape}", file=sys.stderr)
    return place


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
    else:
        with fresh_file_system() as fresh:
            yield fresh


def main(arguments: list[str]) -> int:
    """Measure, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks store", description=__doc__)
    parser.add_argument("words", nargs="*", help="only these: open images content snapshots image du gc")
    parser.add_argument("--blobs", type=int, default=1_000_000)
    parser.add_argument("--snapshots", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--at", type=Path, help="keep the stores in this folder, or use those there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them against their targets here")
    options = parser.parse_args(arguments)
    shape = Shape(options.blobs, options.snapshots, options.images)
    found = []
    with _folder(options.at) as folder, tempfile.TemporaryDirectory(dir=folder) as beside:
        few = replace(shape, blobs=shape.blobs * 10 // shape.images, images=10)
        large, small = _filled(folder / "large", shape), _filled(Path(beside) / "small", few)
        for name, measure in sections(large, small).items():
            if not options.words or name in options.words:
                for figure in measure():
                    found.append(figure)
                    print(figure, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n")
    if options.plot:
        from benchmarks.plot import draw_shares  # which alone needs matplotlib

        bounded = {f"{f.name}, {f.value:.3g} {f.unit}": f.value / f.most for f in found if f.most}
        draw_shares(f"a store of {shape.blobs:,} blobs", bounded, options.plot)
    return int(any(figure.misses for figure in found))
