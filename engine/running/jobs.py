"""What a monitor is told to do, as a value that goes from the engine to its reaper.

Pure, and light: the reaper imports it (msgspec alone would take half of its time to start).
"""

import json
from typing import NamedTuple

from engine.limits import LOG

__all__ = ["ENVIRONMENT", "PATH", "Launch", "decoded", "encoded"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH}
"""Of runtimes, and of all that starts them: not told of the engine's surroundings, among which are
sockets and descriptors (NOTIFY_SOCKET, LISTEN_FDS) that a runtime would hand on."""


class Launch(NamedTuple):
    """A container to start, to watch until it ends, and what to do then."""

    folder: str
    """The container's own, with its `config.json`; everything of its monitor is in it."""
    unique: str
    """What the runtime calls the container, and what its cgroup is called: `lamina-UNIQUE`."""
    argv: tuple[str, ...]
    """What starts it, detached (`engine.running.runc.run_argv`)."""
    terminal: bool = False
    """Whether it has one, as its `config.json` says; then it has one output and not two."""
    stdin: bool = False
    """Whether its input comes from clients; else it is empty. A terminal's always does."""
    attached: bool = False
    """Whether whoever starts it is the first client: nothing that it writes is lost to him."""
    log_limit: int = LOG
    """Bytes of each of its two log files."""
    exit_argv: tuple[str, ...] = ()
    """Run when it has ended, by what the monitor leaves behind; not if the first client saw the end."""


def encoded(launch: Launch) -> bytes:
    """Return a job as bytes."""
    return json.dumps(launch).encode()


def decoded(data: bytes) -> Launch:
    """Return the job that `encoded` made bytes of."""
    folder, unique, argv, terminal, stdin, attached, log_limit, exit_argv = json.loads(data)
    return Launch(folder, unique, tuple(argv), terminal, stdin, attached, log_limit, tuple(exit_argv))
