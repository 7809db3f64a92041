"""Further commands in a container that runs.

Async. Such a command needs no monitor: it is the caller's, and ends with him.
"""

import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from engine.errors import os_errors
from engine.running.further import write_process
from engine.running.jobs import ENVIRONMENT
from engine.running.options import ExecOptions
from engine.running.runc import Runtime, exec_argv, exec_failure
from engine.running.runtime_log import said

__all__ = ["execute"]


async def execute(
    runtime: Runtime,
    states: Path,
    folder: Path,
    options: ExecOptions,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> int:
    """Run a command in the container of a folder, on the caller's descriptors; return its exit code.

    None is /dev/null. With a terminal `stdin` and `stdout` are one, which the runtime connects to one of
    the container's, sizes too. Cancelled, it is killed. CommandFailed if it cannot be run (126, 127),
    FailedPrecondition if the container does not run, and what `write_process` raises.
    """
    name = f"exec-{secrets.token_hex(8)}"
    log, told = folder / f"{name}.log", folder / f"{name}.json"
    await trio.to_thread.run_sync(write_process, folder, options, told)
    try:
        return await _executed(
            exec_argv(runtime, states, folder.name, told, log), log, (stdin, stdout, stderr)
        )
    finally:
        told.unlink(missing_ok=True)


async def _executed(argv: Sequence[str], log: Path, files: Sequence[int | None]) -> int:
    stdin, stdout, stderr = (subprocess.DEVNULL if file is None else file for file in files)
    with os_errors(argv[0]):
        process = await trio.lowlevel.open_process(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
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
