"""Applies one layer in a worker process, for who has no event loop.

Sync.
"""

import subprocess
from collections.abc import Callable

from engine.diff.apply import Applied
from engine.errors import Unavailable, os_errors
from engine.unpack.jobs import COMMAND, HEADER, ApplyJob, Done, Failed, Reply, decode_reply, frame

__all__ = ["apply_apart"]


def apply_apart(job: ApplyJob, passed: Callable[[], None]) -> Applied:
    """Apply a layer whose bytes are all there; `passed` is called as it gets on, and may end it."""
    with (
        os_errors("starting a worker process"),
        subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        ) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write(frame(job))
            process.stdin.flush()
            while True:
                passed()
                reply = _receive(process)
                if isinstance(reply, Done):
                    return reply.applied
                if isinstance(reply, Failed):
                    raise reply.error
        finally:
            process.kill()


def _receive(process: subprocess.Popen[bytes]) -> Reply:
    assert process.stdout is not None
    head = process.stdout.read(HEADER)
    body = process.stdout.read(int.from_bytes(head, "big"))
    if len(head) < HEADER or len(body) < int.from_bytes(head, "big"):
        raise Unavailable("a worker process ended while it applied a layer; run the command again")
    return decode_reply(body)
