"""Adds up what long work reports, so that it can be seen at any moment how far it is.

Sync; safe from any thread. It holds one entry for each step and item, however much is reported, and a
few seconds of each rate.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from engine.progress import Amount, Headway, Part, Report, Stage, Step, Task

__all__ = ["Tally", "both"]

_WINDOW_S = 5.0  # a rate is that of so long: steady enough to be read, and soon right after a change
_GAP_S = 0.1

_INCOMING = (Step.FETCH, Step.STORE)
_BYTES = {*_INCOMING, Step.UNPACK}
_PARTS = {*_BYTES, Step.FOUND, Step.KEEP, Step.SHARE, Step.FLUSH, Step.DONE}
_WAITS = (Step.OTHER, Step.BELOW, Step.PLACE)
"""The first of those under way is what a part waits for."""


def both(one: Report, other: Report) -> Report:
    """Return a report that tells two."""

    def told(step: Step, item: str, total: int, done: int, /) -> None:
        one(step, item, total, done)
        other(step, item, total, done)

    return told


class _Speed:
    """What was done, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, at: float, done: int) -> None:
        seen = self._seen
        if seen and (seen[-1][1] == done or (len(seen) > 1 and at - seen[-2][0] < _GAP_S)):
            seen.pop()  # the clock runs from when something moves
        seen.append((at, done))
        while len(seen) > 1 and seen[1][0] <= at - _WINDOW_S:
            seen.popleft()

    def rate(self, now: float) -> float:
        """Return how much a second; it falls while nothing comes."""
        if not self._seen:
            return 0.0
        start = self._seen[0]
        for one in self._seen:
            if one[0] > now - _WINDOW_S:
                break
            start = one
        # What others bring in counts until it is found to be here.
        return max(0, self._seen[-1][1] - start[1]) / max(now - start[0], _GAP_S)


class Tally:
    """A report that remembers: `headway` says how far all is that it was told of."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[tuple[Step, str], tuple[int, int]] = {}
        self._items: dict[str, None] = {}
        self._speeds: dict[tuple[Step, str], _Speed] = {}
        self._moved: dict[Step, int] = dict.fromkeys(_BYTES, 0)

    def __call__(self, step: Step, item: str, total: int, done: int, /) -> None:
        """Take note."""
        with self._lock:
            _, before = self._told.get((step, item), (0, 0))
            if step in _BYTES:  # what comes a second time, as the first was wrong, is no step back
                done = max(done, before)
                self._note(step, item, done, before)
            if step in _PARTS or step in _WAITS:
                if item:
                    self._items[item] = None
            elif done >= total > 0:  # there may be a million of those
                self._told.pop((step, item), None)
                return
            self._told[step, item] = (total, done)

    def _note(self, step: Step, item: str, done: int, before: int) -> None:
        _, found = self._told.get((Step.FOUND, item), (0, 0)) if step in _INCOMING else (0, 0)
        self._moved[step] += max(done - found, 0) - max(before - found, 0)
        now = self._clock()
        for key, moved in ((item, max(done - found, 0)), ("", self._moved[step])):
            self._speeds.setdefault((step, key), _Speed()).note(now, moved)

    def replay(self, report: Report) -> None:
        """Tell another report all that counts of what this one was told."""
        with self._lock:
            told = list(self._told.items())
        for (step, item), (total, done) in told:
            report(step, item, total, done)

    def headway(self) -> Headway:
        """Return how far all is now."""
        with self._lock:
            parts = tuple(self._part(item) for item in self._items)
            return Headway(
                parts=parts,
                fetch=self._sum((part.fetch for part in parts), *_INCOMING),
                apply=self._sum((part.apply for part in parts), Step.UNPACK),
                tasks=tuple(
                    Task(step, item, total, done)
                    for (step, item), (total, done) in self._told.items()
                    if item not in self._items and step not in {Step.WAIT, Step.SHARE}
                ),
                callers=max(1, self._told.get((Step.SHARE, ""), (1, 1))[1]),
                waits=tuple(
                    item for (step, item), (total, done) in self._told.items() if step is Step.WAIT
                ),
            )

    def _sum(self, amounts: Iterable[Amount | None], *steps: Step) -> Amount:
        some = [amount for amount in amounts if amount]
        now = self._clock()
        speeds = [self._speeds[step, ""] for step in steps if (step, "") in self._speeds]
        return Amount(
            sum(amount.done for amount in some),
            sum(amount.total for amount in some),
            sum(speed.rate(now) for speed in speeds),
            sum(amount.found for amount in some),
        )

    def _part(self, item: str) -> Part:
        told = {step: self._told[step, item] for step in Step if (step, item) in self._told}
        incoming = next((step for step in _INCOMING if step in told), None)
        fetch = self._amount(incoming, item, told) if incoming else None
        is_applied = Step.PLACE in told or Step.UNPACK in told
        apply = self._amount(Step.UNPACK, item, told) if is_applied else None
        is_in = fetch is None or Step.KEEP in told
        is_done = is_in and (Step.DONE in told or apply is None)
        waits = [step for step in _WAITS if step in told and told[step][1] < told[step][0]]
        return Part(
            digest=item,
            stage=Stage.DONE if is_done else _stage(told, fetch, apply, waits),
            fetch=fetch,
            apply=apply,
            waits_for=None if is_done or not waits else waits[0],
            callers=max(1, told.get(Step.SHARE, (1, 1))[1]),
        )

    def _amount(self, step: Step, item: str, told: dict[Step, tuple[int, int]]) -> Amount:
        total, done = told.get(step) or (told[Step.PLACE][0], 0)
        found = min(done, told.get(Step.FOUND, (0, 0))[1]) if step in _INCOMING else 0
        if step is Step.UNPACK and Step.DONE in told:  # what was not gone through was not needed
            done, found = total, total - done
        speed = self._speeds.get((step, item))
        return Amount(done, total, speed.rate(self._clock()) if speed else 0.0, found)


def _stage(
    told: dict[Step, tuple[int, int]], fetch: Amount | None, apply: Amount | None, waits: list[Step]
) -> Stage:
    """Return the stage of a part that is not done; while its bytes come that is what is told."""
    if fetch and 0 < fetch.done < fetch.total:
        return Stage.FETCHING
    if fetch and fetch.done > 0 and Step.KEEP not in told:
        return Stage.VERIFYING
    if waits or apply is None or not apply.done:
        return Stage.WAITING
    return Stage.APPLYING if apply.done < apply.total else Stage.COMMITTING
