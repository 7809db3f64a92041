"""What a disk holds of files when the power goes: what was durable, and any part of what was not.

Pure, but for chance.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.power.trace import Committed, Event, Punched, Recorded, Synced, Written

__all__ = ["Cut", "cuts"]

_SECTOR = 512  # bytes that a disk writes whole or not at all


@dataclass(frozen=True)
class Cut:
    """The files after a cut, and how many commits of each were acknowledged before."""

    number: int
    files: Mapping[str, bytes]
    acknowledged: Mapping[str, int]


class _File:
    """A file: what is on the disk for certain, and what is on its way there, in the order of calls."""

    def __init__(self, data: bytes) -> None:
        self._durable = bytearray(data)
        self._pending: list[Written | Punched] = []

    def pass_by(self, event: Event) -> None:
        """Let a call end."""
        if isinstance(event, Synced):
            for change in self._pending:
                _apply(self._durable, change)
            self._pending.clear()
        elif isinstance(event, Written) and event.through:
            _apply(self._durable, event)
        elif isinstance(event, Written | Punched):
            self._pending.append(event)

    def cut(self, source: random.Random, share: float, under_way: Event | None) -> bytes:
        """Return the file with so large a share of what was pending, and of the call under way."""
        data = bytearray(self._durable)
        changes = [*self._pending]
        if isinstance(under_way, Written | Punched):
            changes.append(under_way)
        for change in changes:
            chance = source.random()
            if chance < share:
                _apply(data, change)
            elif chance < 2 * share:
                for part in _torn(source, change):
                    _apply(data, part)
        # The file may have become longer before what was written there has arrived.
        end = max((c.start + len(c.data) for c in changes if isinstance(c, Written)), default=0)
        if end > len(data) and source.random() < share:
            data += bytes(source.randrange(end - len(data)) + 1)
        return bytes(data)


def _apply(data: bytearray, change: Written | Punched) -> None:
    if isinstance(change, Punched):
        end = min(change.start + change.length, len(data))
        data[change.start : end] = bytes(max(0, end - change.start))
        return
    data += bytes(max(0, change.start - len(data)))
    data[change.start : change.start + len(change.data)] = change.data


def _torn(source: random.Random, change: Written | Punched) -> Iterator[Written | Punched]:
    """Yield some of the sectors of a change, in any combination."""
    if isinstance(change, Punched):
        yield Punched(change.file, change.start, source.randrange(change.length) & -4096)
        return
    # LMDB trusts a disk in one thing: that the 120 bytes of a meta page, which lie in one sector, are
    # written whole or not at all. So does everything that says so little at once.
    keep = source.choice((0.1, 0.5, 0.9))
    at, end = change.start, change.start + len(change.data)
    while at < end:
        following = min((at // _SECTOR + 1) * _SECTOR, end)
        if source.random() < keep:
            piece = change.data[at - change.start : following - change.start]
            yield Written(change.file, at, piece, change.through)
        at = following


def cuts(recorded: Recorded, count: int, seed: str) -> Iterator[Cut]:
    """Yield so many states that a power cut could leave, from the first call to the last.

    At each moment first with all that was written, then with nothing that was not durable, then with
    any part of it. Both files are cut at the same moment.
    """
    files = {name: _File(data) for name, data in recorded.before.items()}
    acknowledged = dict.fromkeys(files, 0)
    moments = _moments(recorded.events, count)
    number = 0
    for position, event in enumerate(recorded.events):
        for turn in range(moments[position]):
            source = random.Random(f"{seed} {position} {turn}")
            share = (1.0, 0.0)[turn] if turn < 2 else source.choice((0.1, 0.3, 0.5))
            left = {
                name: file.cut(source, share, event if event.file == name else None)
                for name, file in files.items()
            }
            yield Cut(number, left, dict(acknowledged))
            number += 1
        files[event.file].pass_by(event)
        if isinstance(event, Committed):
            acknowledged[event.file] += 1


def _moments(events: Sequence[Event], count: int) -> list[int]:
    """Return how many cuts there are before each call ends: none where a call changes nothing."""
    worth = [not isinstance(event, Committed) for event in events]
    every, more = divmod(count, sum(worth))
    found = []
    for is_worth in worth:
        found.append((every + (more > 0)) * is_worth)
        more -= is_worth
    return found
