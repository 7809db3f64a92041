"""How far work is, as lines of text: for a terminal of any size, and as one line for a log.

Sync. A layer has one line, for its bytes on their way in and then for its way into a tree. Where there
is not enough room for all, those that move are shown, then those that wait; the others are counted.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size

from engine.cli.output import counted, human_bytes, short
from engine.errors import printable
from engine.progress import Amount, Headway, Part, Stage, Step, Task

__all__ = ["lines", "summary"]

_COUNTED = {Step.FLUSH: "layers", Step.SWEEP: "records", Step.COUNT: "images"}
_OF_BLOBS = {Step.VERIFY, Step.PUSH}  # by their digests
_BAR = 8  # columns that a bar has at least
_TASKS = 8
_URGENT = {Stage.WAITING: 1, Stage.DONE: 2}  # all others move
_WHY = {Step.OTHER: "another process", Step.BELOW: "layers below"}


def lines(headway: Headway, width: int, height: int, bar: str = "━─") -> Iterator[str]:
    """Yield what fits on a terminal, of which the last line and column stay empty.

    `bar` is drawn of what is done and of what is left.
    """
    width -= 1
    rows = [_row(*_waiting(words), width) for words in headway.waits[:3]]
    rows += [_of_task(task, width, bar) for task in headway.tasks[-_TASKS:]]
    if headway.parts:
        room = max(1, height - len(rows) - 2)
        shown = _shown(headway.parts, room if len(headway.parts) <= room else room - 1)
        rows += [_of_part(part, width, bar) for part in shown]
        if left := len(headway.parts) - len(shown):
            rows.append(_row(f"and {left} more", "", width))
        rows.append(_row(_total(headway, width), "", width))
    yield from rows[-max(1, height - 1) :]


def summary(headway: Headway) -> str:
    """Return how far an image is, in one line: what is done, moves and waits, and how long yet."""
    stages = Counter(part.stage for part in headway.parts)
    moving = [f"{stages[stage]} {stage}" for stage in Stage if stage is not Stage.DONE and stages[stage]]
    done, *more = _said(headway)
    return ", ".join([f"{done}: {'/'.join(moving)}" if moving else done, *more])


def _total(headway: Headway, width: int) -> str:
    """Return the same without what the lines say, and on a narrow terminal without more."""
    said = _said(headway)
    while len(said) > 1 and cell_len(", ".join(said)) > width:
        said.pop(-2 if len(said) > 2 else -1)  # how long it takes goes last
    return ", ".join(said)


def _said(headway: Headway) -> list[str]:
    way = headway.fetch if headway.fetch.done < headway.fetch.total else headway.apply
    way = way if way.total else headway.fetch
    said = [f"{headway.done} of {counted(len(headway.parts), 'layer')} done"]
    if way.total:
        said.append(_amount(way.done, way.total))
    if way.rate and way.done < way.total:
        said.append(f"{human_bytes(way.rate)}/s")
    left = headway.remaining
    if left and headway.done < len(headway.parts):
        said.append(f"about {_span(left)} left")
    return said


def _shown(parts: Sequence[Part], room: int) -> list[Part]:
    """Choose parts that say most, in their own order."""
    order = sorted(range(len(parts)), key=lambda at: _URGENT.get(parts[at].stage, 0))
    return [parts[at] for at in sorted(order[: max(0, room)])]


def _of_part(part: Part, width: int, bar: str) -> str:
    way = part.apply if part.stage in {Stage.APPLYING, Stage.COMMITTING} else part.fetch or part.apply
    left = f"{short(part.digest):<12} {part.stage:<10}"
    if part.stage is Stage.WAITING and part.waits_for in _WHY:
        return _row(f"{left} for {_WHY[part.waits_for]}", "", width)
    if part.stage is Stage.DONE or way is None or (part.stage is Stage.WAITING and not way.done):
        return _row(left, human_bytes(way.total) if way else "", width)
    return _barred(left, way, f"{human_bytes(way.rate):>8}/s" if way.rate else " " * 10, width, bar)


def _of_task(task: Task, width: int, bar: str) -> str:
    name = short(task.item) if task.step in _OF_BLOBS else printable(task.item)
    left = f"{task.step:<10} {name}"
    if task.step in _COUNTED:
        return _row(left, f"{task.done} of {task.total} {_COUNTED[task.step]}", width)
    if not task.total:
        return _row(left, human_bytes(task.done) if task.done else "", width)
    return _barred(left, Amount(task.done, task.total), "", width, bar)


def _barred(left: str, way: Amount, rate: str, width: int, bar: str) -> str:
    """Return a line with a bar in the room that is left; on a narrow terminal with less beside it."""
    share = way.done / way.total if way.total else 1.0
    for right in (f"{_amount(way.done, way.total)} {rate}", f"{share:4.0%}", ""):
        room = width - cell_len(left) - cell_len(right) - 2
        if room >= _BAR:
            whole = round(share * room)
            return _row(f"{left} {bar[0] * whole}{bar[1] * (room - whole)}", right, width)
    return _row(left, f"{share:.0%}", width)


def _row(left: str, right: str, width: int) -> str:
    """Return a line that fits, with something on the right that is whole if that fits."""
    if not right:
        return set_cell_size(left, width).rstrip() if cell_len(left) > width else left
    room = width - cell_len(right) - 1
    return f"{set_cell_size(left, room)} {right}" if room > 0 else set_cell_size(left, width)


def _waiting(words: str) -> tuple[str, str]:
    return f"waiting: {printable(words)}", ""


def _amount(done: int, total: int) -> str:
    return f"{human_bytes(done)} of {human_bytes(total)}"


def _span(seconds: float) -> str:
    """Return a time to come: to the second, from two minutes on to the minute."""
    whole = max(1, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
