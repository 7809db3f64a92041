"""Counts what is done to a store by this process: calls and how they end, bytes, time by phase, hits.

Sync; safe from any thread. It is told of whole calls, layers and blobs, never of single reads or files.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from engine.errors import EngineError
from engine.phases import Phase, Spent, Timings, total

__all__ = ["Calls", "Histogram", "Layers", "Meter", "Moved", "Pauses", "Statistics", "Verb"]


class Verb(StrEnum):
    """What callers ask for."""

    PULL = "pull"
    PUSH = "push"
    IMPORT = "import"
    UNPACK = "unpack"
    COLLECT = "collect"
    CHECK = "check"
    LAUNCH = "launch"
    DESTROY = "destroy"


class Moved(StrEnum):
    """Bytes, by what became of them."""

    FETCHED = "fetched"
    STORED = "stored"
    FOUND = "found"
    """Wanted by a pull or import, and here before."""
    UNPACKED = "unpacked"


class Layers(StrEnum):
    """Layers that were asked for, by how they were had."""

    APPLIED = "applied"
    REUSED = "reused"
    """Their data was here from another base."""
    FOUND = "found"
    """Unpacked before, or by another process."""
    SHARED = "shared"
    """Another caller was at it."""


class Calls(msgspec.Struct, frozen=True):
    """How often something was asked for."""

    in_flight: int = 0
    results: Mapping[str, int] = {}
    """`ok`, `cancelled`, or the error's class (`engine.errors`)."""
    seconds: float = 0.0
    """Of those that have ended, all together."""


class Histogram(msgspec.Struct, frozen=True):
    """How often values were up to each bound; the last count is of those beyond."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    def with_one(self, value: float) -> "Histogram":
        """Return it with one value more."""
        counts = [*(self.counts or (0,) * (len(self.bounds) + 1))]
        counts[bisect_left(self.bounds, value)] += 1
        return Histogram(self.bounds, tuple(counts), self.sum + value)


class Pauses(msgspec.Struct, frozen=True):
    """How often and how long, in seconds, a collection kept others from writing records."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What this process has done to a store since it began."""

    root: str
    calls: Mapping[Verb, Calls]
    phases: Timings
    moved: Mapping[Moved, int]
    """Bytes."""
    layers: Mapping[Layers, int]
    pulls_shared: int
    """Pulls that were another caller's too."""
    pull_seconds: Histogram
    """Of pulls that fetched something, from the name to the record."""
    pull_throughput: Histogram
    """Of those, bytes a second; what was here before does not count."""
    collected: Mapping[str, int]
    """What collections removed, by kind; `bytes` of content and snapshots."""
    pauses: Pauses
    containers: Mapping[str, int] = {}
    """How many there are, by state, where they were counted."""


class Meter:
    """The counters of one store in this process."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._lock = threading.Lock()
        self._in_flight: Counter[Verb] = Counter()
        self._results: dict[Verb, Counter[str]] = {work: Counter() for work in Verb}
        self._seconds: dict[Verb, float] = dict.fromkeys(Verb, 0.0)
        self._phases: Timings = {}
        self._moved: Counter[Moved] = Counter()
        self._layers: Counter[Layers] = Counter()
        self._pulls_shared = 0
        self._pull_seconds = Histogram((0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0))
        self._pull_throughput = Histogram((1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9))
        self._collected: Counter[str] = Counter()
        self._pauses = Pauses()

    @contextmanager
    def working(self, work: Verb) -> Iterator[None]:
        """Count a call, for the length of a block, and how it ends."""
        with self._lock:
            self._in_flight[work] += 1
        began, result = time.monotonic(), "cancelled"
        try:
            yield
            result = "ok"
        except Exception as error:
            result = type(error).__name__ if isinstance(error, EngineError) else "bug"
            raise
        finally:
            with self._lock:
                self._in_flight[work] -= 1
                self._results[work][result] += 1
                self._seconds[work] += time.monotonic() - began

    def spent(self, timings: Timings) -> None:
        """Count time."""
        with self._lock:
            self._phases = total(self._phases, timings)

    def moved(self, kind: Moved, count: int) -> None:
        """Count bytes."""
        with self._lock:
            self._moved[kind] += count

    def had(self, kind: Layers, count: int = 1) -> None:
        """Count layers."""
        with self._lock:
            self._layers[kind] += count

    def shared_pull(self) -> None:
        """Count a caller who shares the pull of another."""
        with self._lock:
            self._pulls_shared += 1

    def pulled(self, fetched: int, seconds: float) -> None:
        """Count a pull of so many bytes; one that fetched none is not timed."""
        with self._lock:
            if fetched:
                self._pull_seconds = self._pull_seconds.with_one(seconds)
                self._pull_throughput = self._pull_throughput.with_one(fetched / max(seconds, 1e-9))

    def collected(self, **counts: int) -> None:
        """Count what a collection removed."""
        with self._lock:
            self._collected.update(counts)

    def paused(self, seconds: float) -> None:
        """Count a time for which a collection kept others from writing records."""
        with self._lock:
            pauses = self._pauses
            longest = max(pauses.longest, seconds)
            self._pauses = Pauses(pauses.count + 1, pauses.total + seconds, longest)

    def statistics(self, root: str) -> Statistics:
        """Return all of it as it is now."""
        with self._lock:
            return Statistics(
                root=root,
                calls={
                    work: Calls(self._in_flight[work], dict(self._results[work]), self._seconds[work])
                    for work in Verb
                },
                phases={phase: self._phases.get(phase, Spent()) for phase in Phase},
                moved={kind: self._moved[kind] for kind in Moved},
                layers={kind: self._layers[kind] for kind in Layers},
                pulls_shared=self._pulls_shared,
                pull_seconds=self._pull_seconds,
                pull_throughput=self._pull_throughput,
                collected=dict(self._collected),
                pauses=self._pauses,
            )
