"""Further commands in a container that runs.

Async. Such a command needs no monitor: it is the caller's, and ends with him.
"""

from pathlib import Path

from engine.running.runc import Execution, Runtime

__all__ = ["execute"]


async def execute(  # noqa: PLR0913  three of them are its standard input and outputs
    runtime: Runtime,
    states: Path,
    folder: Path,
    container: str,
    execution: Execution,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> int:
    """Run a command in a container, with descriptors of the caller's as its own; return its exit code.

    None is /dev/null. With a terminal `stdin` and `stdout` are one, which the runtime connects to one of
    the container's, sizes too. Cancelled, it is killed. CommandFailed if it cannot be run (126, 127),
    FailedPrecondition if the container does not run.
    """
    raise NotImplementedError
