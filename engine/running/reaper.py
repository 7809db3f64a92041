"""Forks a monitor for each container that it is told to start, quickly, as it has little in memory.

Sync; a process of its own, started by `engine.running.reaping`. Its standard input is a socket of
packets (SOCK_SEQPACKET): each is a job (`engine.running.jobs`) with the descriptor of a connection to
whoever asks for it. It ends when the other end of the socket is closed; monitors go on.
"""

import gc
import os
import signal
import socket

from engine.running.frames import FAILED, frame
from engine.running.jobs import Launch, decoded
from engine.running.monitor import watch

__all__ = ["main"]

_JOB_BYTES = 128 * 1024  # the largest: paths, and two commands


def main() -> None:
    """Take jobs until nobody is there to give any."""
    jobs = socket.socket(fileno=0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # of the engine's descriptors some may be inheritable
    os.chdir("/")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # then the kernel forgets monitors as they end
    gc.freeze()  # a collection in a monitor would copy all that they share
    while True:
        data, files, _, _ = socket.recv_fds(jobs, _JOB_BYTES, 1)
        if not data:
            os._exit(0)  # with nothing to clear up, for which somebody would have to wait
        os.set_inheritable(files[0], False)
        with socket.socket(fileno=files[0]) as channel:
            _fork(decoded(data), channel, jobs)


def _fork(launch: Launch, channel: socket.socket, jobs: socket.socket) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        text = b'{"kind": "ResourceExhausted", "message": "starting a monitor: %s"}'
        channel.sendall(frame(FAILED, text % os.strerror(error.errno or 0).encode()))
        return
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, 0)
            os.close(null)
            jobs.detach()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch(launch, channel)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
