"""All cores at once: work divided into one share for each, in processes of their own."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from benchmarks.costs import Cost

__all__ = ["CORES", "chunks", "results", "spread", "timed_on_cores"]

_T = TypeVar("_T")
_FORK = multiprocessing.get_context("fork")  # so that a work may be what it closes over, however large
CORES = len(os.sched_getaffinity(0))


def spread(items: Iterable[_T], cost: Callable[[_T], float], shares: int) -> list[list[_T]]:
    """Divide independent items, the costly first, each to whoever has least to do."""
    found: list[list[_T]] = [[] for _ in range(shares)]
    load = [0.0] * shares
    for item in sorted(items, key=cost, reverse=True):
        least = load.index(min(load))
        found[least].append(item)
        load[least] += cost(item)
    return found


def chunks(items: Sequence[_T], cost: Callable[[_T], float], shares: int) -> list[list[_T]]:
    """Divide items into runs of neighbours that cost about the same."""
    total = sum(map(cost, items))
    found: list[list[_T]] = [[] for _ in range(shares)]
    done = 0.0
    for item in items:
        # By its middle: a costly item belongs where most of it lies.
        middle = done + cost(item) / 2
        found[min(int(middle * shares / total), shares - 1) if total else 0].append(item)
        done += cost(item)
    return found


def timed_on_cores(*phases: Sequence[Callable[[], object]]) -> Cost:
    """Run the works of each phase at once, a process for each; starting those is not timed."""
    return sum((_timed(phase) for phase in phases), Cost())


def _timed(works: Sequence[Callable[[], object]]) -> Cost:
    started = [_start(work) for work in works]
    for ours, _ in started:
        ours.recv()
    start = time.perf_counter()
    for ours, _ in started:
        ours.send("go")
    spent = [ours.recv() for ours, _ in started]
    seconds = time.perf_counter() - start
    for _, process in started:
        process.join()
    return Cost(seconds, sum(user for user, _ in spent), sum(system for _, system in spent))


def _told(ours: Connection, work: Callable[[], object]) -> None:
    ours.send("ready")
    ours.recv()
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    ours.send((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))


def results(works: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return what each work returns, as many of them at once as there are cores."""
    with _FORK.Pool(min(CORES, len(works)) or 1) as pool:
        return [pending.get() for pending in [pool.apply_async(work) for work in works]]


def _start(work: Callable[[], object]) -> tuple[Connection, BaseProcess]:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_told, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()  # so that the death of the other is the end of what is read
    return ours, process
