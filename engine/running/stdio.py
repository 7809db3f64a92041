"""The standard input and outputs of a container: pipes, or a terminal that the runtime makes and sends.

Sync; one thread. Light: the monitor imports it. Paths are relative to the container's folder.
"""

import fcntl
import os
import socket
import struct
import termios

from engine.running.frames import STDERR, STDOUT

__all__ = ["Stdio"]

_TIOCGPTPEER = 0x5441  # ioctl_tty(2), Linux 4.13
_CONSOLE = "console"


class Stdio:
    """Our ends of them, once the container is started; until then, what it is started with."""

    def __init__(self, *, terminal: bool, stdin: bool) -> None:
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._listening: socket.socket | None = None
        self._peer = -1
        self.input = -1
        """-1 if there is none."""
        self.outputs: dict[int, bytes] = {}
        """What is read from each descriptor: STDOUT or STDERR."""
        self.given = [self._null, self._null, self._null]
        """What the runtime is to have as its own."""
        self.terminal = terminal
        if terminal:
            self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listening.bind(_CONSOLE)
            self._listening.listen(1)
            self._listening.setblocking(False)
            return
        if stdin:
            self.given[0], self.input = os.pipe()
        for number, kind in ((1, STDOUT), (2, STDERR)):
            ours, self.given[number] = os.pipe()
            self.outputs[ours] = kind

    def begun(self) -> None:
        """Let go of what only the container has from now on; take its terminal."""
        for file in {*self.given, self._null}:
            os.close(file)
        if self._listening is not None:
            self._take_terminal(self._listening)
            self._listening.close()
            os.unlink(_CONSOLE)
        for file in {*self.outputs, self.input} - {-1}:
            os.set_blocking(file, False)

    def _take_terminal(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.setblocking(True)
            _, files, _, _ = socket.recv_fds(connection, 4096, 1)
        os.set_inheritable(files[0], False)
        self.input = files[0]
        self.outputs = {files[0]: STDOUT}
        # While nobody has it open its master reads as ended, and is always ready: a container may close
        # it and open it again.
        flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
        self._peer = fcntl.ioctl(files[0], _TIOCGPTPEER, flags)

    def ended(self) -> None:
        """Have the output of a terminal end when the container's processes have all closed it."""
        if self._peer >= 0:
            os.close(self._peer)
            self._peer = -1

    def close_input(self) -> None:
        """End the input; that of a terminal is its output, too."""
        if self.input >= 0 and not self.terminal:
            os.close(self.input)
        self.input = -1

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of a terminal."""
        if self.terminal:
            for file in self.outputs:
                fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
