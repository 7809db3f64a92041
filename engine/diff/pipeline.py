"""Run parts of a pipeline on threads of their own, a bounded few pieces ahead or behind.

Sync. Inflating and hashing release the interpreter lock, so that they overlap with each other and with
the system calls of the rest.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from engine.phases import Phase, measured

__all__ = ["ahead", "behind"]

T = TypeVar("T")
_DEPTH = 4  # pieces in flight: enough to smooth a large file, few enough to bound memory


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def ahead(pieces: Iterable[T], phase: Phase) -> Iterator[Iterator[T]]:
    """Iterate over `pieces` on a thread, which is `phase`, and give them here, or its error.

    When the block ends early, the thread ends after the piece that it is making.
    """
    box: queue.Queue[T | _End] = queue.Queue(_DEPTH)
    stop = threading.Event()

    def produce() -> None:
        error: BaseException | None = None
        try:
            with measured(phase):
                for piece in pieces:
                    box.put(piece)
                    if stop.is_set():
                        return
        except BaseException as caught:  # noqa: BLE001  it is raised again in the consumer
            error = caught
        box.put(_End(error))

    def consume() -> Iterator[T]:
        while not isinstance(piece := box.get(), _End):
            yield piece
        if piece.error is not None:
            raise piece.error

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        while thread.is_alive():
            _drain(box)
            thread.join(0.01)


@contextmanager
def behind(take: Callable[[T], object], phase: Phase) -> Iterator[Callable[[T], None]]:
    """Give what has `take`, which is `phase`, called with pieces in order, from the second on a thread.

    All is done when the block ends; an error of the thread is raised then.
    """
    box: queue.Queue[T | _End] = queue.Queue(_DEPTH)
    errors: list[BaseException] = []

    def consume() -> None:
        with measured(phase):
            while not isinstance(piece := box.get(), _End):
                try:
                    if not errors:
                        take(piece)
                except BaseException as caught:  # noqa: BLE001  it is raised again in the giver
                    errors.append(caught)

    thread = threading.Thread(target=consume, name="behind", daemon=True)
    is_first = True

    def give(piece: T) -> None:
        nonlocal is_first
        if is_first:  # and mostly the last: to start a thread takes as long as all else of a small layer
            is_first = False
            take(piece)
            return
        if thread.ident is None:
            thread.start()
        box.put(piece)

    try:
        yield give
    finally:
        if thread.ident is not None:
            box.put(_End(None))
            thread.join()
    if errors:
        raise errors[0]


def _drain(box: "queue.Queue[T | _End]") -> None:
    try:
        while True:
            box.get_nowait()
    except queue.Empty:
        return
