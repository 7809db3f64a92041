"""Further commands in a container that runs.

Async. Such a command needs no monitor: it is the caller's, and ends with him.
"""

import os
import secrets
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import trio

from engine.errors import os_errors
from engine.running.runc import ENVIRONMENT, ExecCommand, Runtime, exec_argv, exec_failure
from engine.running.runtime_log import said

__all__ = ["execute"]


async def execute(
    runtime: Runtime,
    states: Path,
    folder: Path,
    execution: ExecCommand,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> int:
    """Run a command in the container of a folder, on the caller's descriptors; return its exit code.

    None is /dev/null. With a terminal `stdin` and `stdout` are one, which the runtime connects to one of
    the container's, sizes too. Cancelled, it is killed. CommandFailed if it cannot be run (126, 127),
    FailedPrecondition if the container does not run.
    """
    log = folder / f"exec-{secrets.token_hex(8)}.log"
    with os_errors(runtime.path):
        process = await trio.lowlevel.open_process(
            exec_argv(runtime, states, folder.name, execution, log),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            env=ENVIRONMENT,
        )
    try:
        code = await process.wait()
    except trio.Cancelled:
        _kill(process)
        with trio.CancelScope(shield=True):
            await process.wait()
            await trio.to_thread.run_sync(said, log)
        raise
    reason = await trio.to_thread.run_sync(said, log)
    if code and reason:
        raise exec_failure(reason)
    return code if code >= 0 else 128 - code


def _kill(process: trio.Process) -> None:
    """Kill a runtime and the command that it runs in a container, its child."""
    process.send_signal(signal.SIGSTOP)  # so that it waits for none: their pids stay theirs
    with suppress(OSError):
        for task in os.listdir(f"/proc/{process.pid}/task"):
            children = Path(f"/proc/{process.pid}/task/{task}/children").read_bytes()
            for child in map(int, children.split()):
                os.kill(child, signal.SIGKILL)
    process.kill()
