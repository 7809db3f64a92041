"""The monitor of one container: starts it, has its input and outputs, and tells how it ended.

Sync; a process of its own, forked by the reaper, which it outlives. Light: the reaper imports it. All
that it makes is in the container's folder:

    monitor   byte 0 is locked as long as it lives (F_OFD_SETLK); its pid, and what went wrong with it
    pid       of the container's process, as the runtime wrote it
    log       what the container wrote (`engine.running.logfile`)
    attach    the socket for clients (`engine.running.frames`), until the container has ended
    exit      how the container ended: {"code": n, "at": ns, "oom": true or false}
    exit.new  until then the room for that: the container may have filled the disk
"""

import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError, from_os_error
from engine.fs.durable import flush, flush_names
from engine.fs.kernel import adopt_orphans
from engine.fs.locks import lock_byte
from engine.limits import FAREWELL_S, LAST_OUTPUT_S, START_GRACE_S
from engine.running.cgroups import was_oom_killed
from engine.running.clients import Clients
from engine.running.frames import FAILED, STARTED, frame
from engine.running.jobs import ENVIRONMENT, Launch
from engine.running.logfile import LogFile
from engine.running.polling import Polling
from engine.running.relaying import Relay
from engine.running.runtime_log import RUNTIME_LOG, said
from engine.running.stdio import Stdio

__all__ = ["watch"]

_FILE = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_EXIT = 256  # bytes at most
_MAKING = b"runc:["  # `runc:[2:INIT]`
_MOMENT_S = 0.0005  # that it takes from the runtime's end


class _NotStarted(Exception):
    """The runtime could not start the container, and said why."""


def watch(launch: Launch, channel: socket.socket) -> None:
    """Do all that a monitor does, in a process that ends then; `channel` is to whoever starts it."""
    claim = -1
    try:
        os.setsid()
        os.umask(0o077)
        os.chdir(launch.folder)
        claim = os.open("monitor", os.O_RDWR | _FILE, 0o600)
        lock_byte(claim, 0, alone=True)
        os.write(claim, b"%d\n" % os.getpid())
        adopt_orphans()
        begun = _begin(launch, channel)
    except BaseException as error:  # noqa: BLE001  told to whoever starts it
        _kill_children()
        with suppress(OSError):
            channel.sendall(frame(FAILED, _told(error)))
        return
    try:
        _attend(launch, channel, *begun)
    except Exception:  # noqa: BLE001  there is nobody to raise it to
        os.dup2(claim, 2)
        sys.excepthook(*sys.exc_info())


def _told(error: BaseException) -> bytes:
    """Return what `FAILED` holds: an error of ours by its kind; none is what the runtime said."""
    if isinstance(error, OSError):
        error = from_os_error(error, "starting a container")
    kind = "" if isinstance(error, _NotStarted) else "EngineError"
    if isinstance(error, EngineError):
        kind = type(error).__name__
    return json.dumps({"kind": kind, "message": str(error)}).encode()


def _begin(launch: Launch, channel: socket.socket) -> tuple[Stdio, int]:
    """Start the container; return its input and outputs, and its pid."""
    # Before he is told, whoever starts it says nothing but KILL.
    if _ready(channel.fileno(), seconds=0):
        # Locked first, then looked: who finds nobody at work on what a dead engine left may remove it.
        raise _NotStarted("nobody waits for it any more")
    _reserve_exit()
    stdio = Stdio(terminal=launch.terminal, stdin=launch.stdin)
    runtime = os.posix_spawn(
        launch.argv[0],
        launch.argv,
        ENVIRONMENT,
        file_actions=[(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(stdio.given)],
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
    )
    _wait(runtime, channel)
    code = os.waitstatus_to_exitcode(os.waitpid(runtime, 0)[1])
    if code:
        raise _NotStarted(said(Path(RUNTIME_LOG)) or f"it ended with status {code}")
    with suppress(FileNotFoundError):
        os.unlink(RUNTIME_LOG)
    pid = int(Path("pid").read_bytes())
    _wait_for_command(pid)
    stdio.begun()
    return stdio, pid


def _wait_for_command(pid: int) -> None:
    """Wait until a container's process is its command, and not what runc made it of.

    A signal before that would end Go's runtime, by itself as nothing ends a first process: with code 2.
    """
    end = time.monotonic() + START_GRACE_S
    with suppress(OSError):  # it is gone
        while Path(f"/proc/{pid}/comm").read_bytes().startswith(_MAKING) and time.monotonic() < end:
            time.sleep(_MOMENT_S)


def _wait(runtime: int, channel: socket.socket) -> None:
    """Wait for the runtime: not for long once whoever starts the container says KILL, or is gone.

    One that was started is killed only if he says so, as any client may. Without him it runs on: others
    may have seen its pid by then.
    """
    ended = os.pidfd_open(runtime)
    try:
        is_wanted = channel.fileno() not in _ready(channel.fileno(), ended)
        # Killed half way it would leave more behind than when it has ended.
        if not is_wanted and not _ready(ended, seconds=START_GRACE_S):
            os.kill(runtime, signal.SIGKILL)
            _ready(ended)
    finally:
        os.close(ended)


def _ready(*files: int, seconds: float | None = None) -> list[int]:
    """Wait for one of some descriptors to be readable, or closed at its other end; return which are."""
    waiting = select.poll()
    for file in files:
        waiting.register(file, select.POLLIN | select.POLLRDHUP)
    return [file for file, _ in waiting.poll(None if seconds is None else 1000 * seconds)]


def _kill_children() -> None:
    """Kill all processes below this one."""
    with suppress(ChildProcessError):
        while True:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_bytes().split()
            for child in map(int, children):
                os.kill(child, signal.SIGKILL)  # ours until it is waited for
            os.waitpid(-1, 0)


def _attend(launch: Launch, channel: socket.socket, stdio: Stdio, pid: int) -> None:
    """Serve a container that was started, to its end and beyond."""
    polling = Polling()
    container = os.pidfd_open(pid)
    code: list[int] = []

    def kill() -> None:
        if not code:
            os.kill(pid, signal.SIGKILL)

    def ended() -> None:
        polling.on(container)
        code.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    polling.on(container, read=ended)
    relay = Relay(polling, stdio, LogFile(launch.log_limit), kill)
    relay.clients.listen()
    relay.clients.send(relay.clients.add(channel, attached=launch.attached), frame(STARTED, b"%d" % pid))
    relay.begin()
    while not code:
        polling.once()
        relay.heed_clients()
    at = time.time_ns()
    relay.container_ended()
    end = time.monotonic() + LAST_OUTPUT_S
    while not relay.is_drained and (left := end - time.monotonic()) > 0:
        polling.once(left)
    told = {"code": code[0] if code[0] >= 0 else 128 - code[0], "at": at}
    written = json.dumps({**told, "oom": was_oom_killed(launch.unique)}).encode()
    try:
        _put_exit(written)
    finally:  # who waits is told, whatever can be kept of it
        relay.clients.tell_end(written)
        _farewell(polling, relay.clients)
    if launch.exit_argv and not relay.clients.first_saw_end:
        os.chdir("/")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execv(launch.exit_argv[0], launch.exit_argv)


def _farewell(polling: Polling, clients: Clients) -> None:
    """Wait until clients have taken what there is: not long, but for the first as long as he is there.

    He may have been stopped at his terminal (Ctrl-Z). It holds up nobody: the end is known.
    """
    end = time.monotonic() + FAREWELL_S
    while clients.any_sent_to:
        left = end - time.monotonic()
        if left <= 0 and not clients.is_first_sent_to:
            return
        polling.once(left if left > 0 else None)


def _reserve_exit() -> None:
    """Take the room on the disk that telling of the end needs."""
    file = os.open("exit.new", os.O_WRONLY | _FILE, 0o600)
    os.posix_fallocate(file, 0, _EXIT)
    os.close(file)


def _put_exit(written: bytes) -> None:
    """Leave how the container ended, whole and durable."""
    file = os.open("exit.new", os.O_WRONLY | _FILE, 0o600)
    os.write(file, written)
    os.ftruncate(file, len(written))
    flush(file)
    os.close(file)
    os.rename("exit.new", "exit")
    flush_names(Path())
