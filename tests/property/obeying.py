"""Processes that do as they are told in lines, and may be killed like any others.

Sync outside, async within. Each is forked for its piece of work from a process that never opens a store
nor starts a thread (`serve`): so there may be a hundred of them in a second. What one does, it writes to
a file line by line, which outlasts it.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.oci.platform import Platform
from engine.registry.client import Access, Client, open_client
from engine.registry.hosts import Host, Origin
from engine.testing.fake_registry import FakeRegistry
from tests.clocks import clock_by_hand
from tests.engine.image_files import AMD64
from tests.inline import workers_inline
from tests.registry.asking import QUICK

__all__ = ["Job", "Log", "Server", "Work", "client_of", "opened", "serve", "served", "tag"]

_STUCK_S = 120  # then a process ends, and its test fails

Job = Mapping[str, Any]
"""What a process is to do: its `kind`, the `root`, the `log` to write, and the time that it is `at`."""


class Log:
    """What happened, in lines that outlast this process."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, **line: Any) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


Work = Callable[[Job, Log], Awaitable[None]]


@asynccontextmanager
async def opened(job: Job) -> AsyncIterator[Engine]:
    """Give the open engine of a job, whose workers are in this process."""
    async with open_engine(Path(job["root"]), platform=Platform(**AMD64)) as engine:
        with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
            yield engine


@asynccontextmanager
async def client_of(registry: FakeRegistry) -> AsyncIterator[Client]:
    """Serve a registry, and give a client to which it is all there is."""
    with registry.running():
        hosts = [Host(origin=Origin("http", "127.0.0.1", registry.port))]
        async with open_client(Access(hosts=lambda _domain: hosts, patience=QUICK)) as client:
            yield client


def tag(registry: FakeRegistry, name: str, target: str) -> None:
    """Have a name of the registry mean a target."""
    word = name.rpartition(":")[2]
    media_type, data = registry.content[f"/a/manifests/{target}"]
    registry.content[f"/a/manifests/{word}"] = (media_type, data)


# -- being told ------------------------------------------------------------------------------------


def _do(job: Job, works: Mapping[str, Work]) -> None:
    os.umask(0)
    signal.alarm(_STUCK_S)
    log = Log(Path(job["log"]))
    with clock_by_hand() as clock:
        clock.at = job["at"]
        trio.run(works[job["kind"]], job, log)


def serve(works: Mapping[str, Work]) -> None:
    """Do the jobs of each line of standard input at once, and tell how their processes ended."""
    for line in sys.stdin:
        statuses = [
            os.waitpid(child, 0)[1] for child in [_forked(job, works) for job in json.loads(line)]
        ]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


def _forked(job: Job, works: Mapping[str, Work]) -> int:
    child = os.fork()
    if not child:
        try:
            _do(job, works)
        except BaseException:  # noqa: BLE001  it is told, and the process ends
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


class Server:
    """A process that serves, of a module that calls `serve`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def does(self, log: Path, *jobs: Job) -> tuple[list[int], list[dict[str, Any]]]:
        """Have jobs done at once; return how their processes ended, and what they told."""
        log.unlink(missing_ok=True)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([{**job, "log": str(log)} for job in jobs]) + "\n")
        self._process.stdin.flush()
        codes: Sequence[int] = json.loads(self._process.stdout.readline())
        lines = log.read_text().splitlines() if log.exists() else []
        return list(codes), [json.loads(line) for line in lines]


@contextmanager
def served(module: str) -> Iterator[Server]:
    """Start a module that serves, for the length of a block."""
    command = (sys.executable, "-P", "-m", module)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process)
        assert process.stdin
        process.stdin.close()
