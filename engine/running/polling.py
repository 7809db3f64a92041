"""Descriptors that are waited for, and what is called when they are ready.

Sync; one thread. Light: the monitor imports it.
"""

import selectors
from collections.abc import Callable

__all__ = ["Polling"]

Ready = Callable[[], object]


class Polling:
    """What a monitor waits for."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._ready: dict[int, tuple[Ready | None, Ready | None]] = {}

    def on(self, file: int, *, read: Ready | None = None, write: Ready | None = None) -> None:
        """Call `read` and `write` when a descriptor is ready for that; without both, forget it.

        A descriptor is to be forgotten before it is closed.
        """
        before = self._ready.get(file, (None, None))
        if (read, write) == before:
            return
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        if not events:
            del self._ready[file]
            self._selector.unregister(file)
            return
        self._ready[file] = (read, write)
        if before == (None, None):
            self._selector.register(file, events)
        else:
            self._selector.modify(file, events)

    def once(self, timeout: float | None = None) -> None:
        """Wait until something is ready, so many seconds at most, and make the calls."""
        for key, events in self._selector.select(timeout):
            # What was called before may have forgotten it.
            read, write = self._ready.get(key.fd, (None, None))
            if read and events & selectors.EVENT_READ:
                read()
            read, write = self._ready.get(key.fd, (None, None))
            if write and events & selectors.EVENT_WRITE:
                write()
