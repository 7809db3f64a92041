"""Starts a reaper (`engine.running.reaper`), without waiting for it to be ready.

Sync; safe from any thread. Light: whoever needs one soon starts it before he loads anything else, as a
Python of its own takes as long as that.
"""

import os
import socket
import sys
from typing import NamedTuple

from engine.errors import os_errors
from engine.running.jobs import ENVIRONMENT

__all__ = ["Reaper", "begin"]

_COMMAND = (sys.executable, "-I", "-m", "engine.running.reaper")


class Reaper(NamedTuple):
    """A child of this process, and the socket that takes jobs to it: closing that ends it."""

    pid: int
    jobs: socket.socket


def begin() -> Reaper:
    """Start a reaper. Raises what an OSError becomes."""
    with os_errors("starting what starts containers"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            pid = os.posix_spawn(
                _COMMAND[0],
                _COMMAND,
                ENVIRONMENT,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, file, number)
                    for number, file in enumerate((theirs.fileno(), null, null))
                ],
                setsid=True,  # what a terminal sends is not for it, nor for monitors
                setsigmask=(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(null)
    return Reaper(pid, ours)
