"""Runs the real command line, here or in a child process, and dumps what a store holds.

Sync. A dump is everything that a command could change: records, the extents of blobs, folders. Two
dumps are compared to show that a command that failed changed nothing.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec

from engine.cli.program import COMMANDS, Listed, run
from engine.kv.environment import Environment
from engine.kv.schema import CLOCKS, COUNTERS, TABLES
from engine.root import Root

__all__ = ["LAMINA", "Dump", "commands", "dump", "empty_store", "environment", "lamina", "lamina_json"]

LAMINA = (sys.executable, "-P", "-m", "engine")
_TIMEOUT_S = 120
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Dump = Mapping[str, list[Any]]
"""Decoded records by table, (key, bytes) of extents, and the names of folders."""


def environment(failpoints: str = "") -> dict[str, str]:
    """Return this process's environment with the failpoints of a child."""
    clean = {key: value for key, value in os.environ.items() if key != "LAMINA_FAILPOINTS"}
    return clean | ({"LAMINA_FAILPOINTS": failpoints} if failpoints else {})


def lamina(
    root: Path, *args: object, code: int = 0, failpoints: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code.

    In this process, which is ten times as fast, but for what may end it or needs one of its own.
    """
    words = ["--root", str(root), *map(str, args)]
    if failpoints or options:
        done = subprocess.run(
            [*LAMINA, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=environment(failpoints),
            **options,
        )
    else:
        done = _run_here(words)
    assert done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stderr}"
    return done


def _run_here(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    out, messages = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = sys.argv
    sys.argv = ["lamina", *words]
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with redirect_stdout(out), redirect_stderr(messages):
            code = run()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = (stream.buffer.getvalue().decode() for stream in (out, messages))
    return subprocess.CompletedProcess(words, code, *texts)


def lamina_json(root: Path, *args: object) -> Any:
    """Run a command with --json and return the one document that it wrote."""
    return json.loads(lamina(root, *args, "--json").stdout)


def commands() -> Iterator[tuple[tuple[str, ...], Listed]]:
    """Yield every command by the words that it is called with, but not under other names."""
    for name, entry in COMMANDS.items():
        if isinstance(entry, Listed):
            yield (name,), entry
        else:
            yield from (((name, below), listed) for below, listed in entry.items())


def empty_store(root: Path) -> Path:
    """Make a store that holds nothing; the one command that makes one also fills it."""
    with Root(root):
        return root


def dump(root: Path) -> Dump:
    """Return what the store at `root` holds; counters, which only ever go up, are left out."""
    with Root(root) as opened:
        tables: dict[str, list[Any]] = {
            name: _values(opened.meta, name)
            for name in TABLES
            if name not in {COUNTERS.name, CLOCKS.name}
        }
        with opened.blobs.read() as txn, txn.raw.cursor() as cursor:
            tables["extents"] = [(bytes(key), len(value)) for key, value in cursor]
        tables["folders"] = sorted(
            str(path.relative_to(opened.path))
            for path in (*opened.snapshots.glob("*/*"), *opened.trash.iterdir())
        )
    return tables


def _values(meta: Environment, name: str) -> list[Any]:
    with meta.read() as txn, txn.raw.cursor(db=txn.databases[name]) as cursor:
        return [msgspec.msgpack.decode(bytes(value)) for _, value in cursor]
