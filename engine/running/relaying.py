"""Between a container and its clients: what it writes goes to its log and to them.

Sync; one thread. Light: the monitor imports it.
"""

import os
from collections.abc import Callable

from engine.limits import LAST_OUTPUT, STDIN_AHEAD
from engine.running.clients import Clients
from engine.running.frames import LARGEST, STDERR
from engine.running.logfile import LogFile
from engine.running.polling import Polling
from engine.running.stdio import Stdio

__all__ = ["Relay"]

_CTRL_D = b"\x04"  # what ends a terminal's input, unless the container says otherwise


class Relay:
    """Passes on what a container and its clients write, as it comes."""

    def __init__(self, polling: Polling, stdio: Stdio, log: LogFile, kill: Callable[[], object]) -> None:
        self._polling = polling
        self._stdio = stdio
        self._log = log
        self._to_write = bytearray()
        self._stdin_ends = False
        self._reads = True
        self._has_ended = False
        self._last = LAST_OUTPUT
        self.clients = Clients(polling, self._take, stdio.resize, kill)

    def begin(self) -> None:
        """Listen to the container."""
        for file in self._stdio.outputs:
            self._wait_for(file)

    def heed_clients(self) -> None:
        """Have the container wait for clients that are behind, and no longer than that."""
        reads = self._has_ended or not self.clients.any_behind
        if reads != self._reads:
            self._reads = reads
            for file in self._stdio.outputs:
                self._wait_for(file)

    def container_ended(self) -> None:
        """Read on, a bounded part more, whatever clients do."""
        self._has_ended = True
        self._stdio.ended()
        self.heed_clients()

    @property
    def is_drained(self) -> bool:
        """Say whether there is nothing to be read any more, or enough was."""
        return not self._stdio.outputs or self._last <= 0

    def _wait_for(self, file: int) -> None:
        is_output = file in self._stdio.outputs and self._reads
        is_input = file == self._stdio.input and bool(self._to_write)
        self._polling.on(
            file,
            read=(lambda: self._read(file)) if is_output else None,
            write=self._write_on if is_input else None,
        )

    def _read(self, file: int) -> None:
        try:
            data = os.read(file, LARGEST)
        except BlockingIOError:
            return
        except OSError:  # of a terminal that nobody has open any more: EIO
            data = b""
        if not data:
            self._close_output(file)
            return
        if self._has_ended:
            self._last -= len(data)
        kind = self._stdio.outputs[file]
        self._log.write(b"stderr" if kind == STDERR else b"stdout", data)
        self.clients.output(kind, data)

    def _close_output(self, file: int) -> None:
        if file == self._stdio.input:
            self._stdio.close_input()
        self._polling.on(file)
        del self._stdio.outputs[file]
        os.close(file)

    def _take(self, data: bytes) -> bool:
        """Take what a client writes, nothing for its end; say whether there is room for more."""
        if self._stdio.input < 0:
            return True  # nobody will read it
        if data:
            self._to_write += data
        elif self._stdio.terminal:
            self._to_write += _CTRL_D
        else:
            self._stdin_ends = True
        self._write_on()
        return len(self._to_write) < STDIN_AHEAD

    def _write_on(self) -> None:
        file = self._stdio.input
        try:
            if self._to_write:
                del self._to_write[: os.write(file, self._to_write)]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its input
            self._to_write.clear()
            self._stdin_ends = True
        if self._stdin_ends and not self._to_write:
            self._polling.on(file)
            self._stdio.close_input()
        else:
            self._wait_for(file)
        if len(self._to_write) < STDIN_AHEAD:
            self.clients.resume()
