"""What a workload wrote to its files, call by call, as strace saw it.

Sync.
"""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.root import Root
from tests.command import environment
from tests.conftest import peer
from tests.power.workload import State
from tests.test_architecture import TOP

__all__ = ["Committed", "Event", "Punched", "Recorded", "Synced", "Written", "record"]

FILES = {"m": "meta.lmdb", "b": "blobs.lmdb"}
_CALLS = "write,writev,pwrite64,pwritev,fdatasync,fsync,msync,ftruncate,fallocate,lseek,openat,close"
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Written:
    """Bytes of a file; with `through` they are durable when the call returns (O_DSYNC)."""

    file: str
    start: int
    data: bytes
    through: bool


@dataclass(frozen=True)
class Punched:
    """A hole."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Synced:
    """All that was written to a file before is durable."""

    file: str


@dataclass(frozen=True)
class Committed:
    """The store said that a transaction of a file is done."""

    file: str


Event = Written | Punched | Synced | Committed


@dataclass(frozen=True)
class Recorded:
    """A store as it was before, what happened to its files, and what they held after each commit."""

    root: Path
    before: Mapping[str, bytes]
    events: Sequence[Event]
    states: Mapping[str, Sequence[State]]


def record(folder: Path, seed: str) -> Recorded:
    """Let a workload run in a new store below `folder`."""
    root, notes, trace = folder / "root", folder / "notes", folder / "trace"
    notes.mkdir()
    with Root(root):
        pass
    paths = {letter: root / name / "data.mdb" for letter, name in FILES.items()}
    before = {letter: path.read_bytes() for letter, path in paths.items()}
    watched = [*paths.values(), notes / "commits"]
    words = [f"-P{path}" for path in watched]
    strace = [peer("strace"), "-f", "-qq", "-xx", f"-s{1 << 26}", f"-etrace={_CALLS}", "-o", trace]
    work = [sys.executable, "-m", "tests.power.workload", root, notes, seed]
    subprocess.run([*strace, *words, *work], check=True, cwd=TOP, env=environment())
    events = list(_events(trace, {os.fspath(path): name for name, path in paths.items()}))
    trace.unlink()
    states = pickle.loads((notes / "states").read_bytes())
    for name, found in states.items():
        commits = sum(event == Committed(name) for event in events)
        assert len(found) == commits + 1, "a commit that was not seen"
    return Recorded(root, before, events, states)


def _calls(trace: Path) -> Iterator[str]:
    """Yield the calls in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in trace.read_text(encoding="ascii").splitlines():
        thread, rest = line.split(maxsplit=1)
        if rest.endswith(" <unfinished ...>"):
            begun[thread] = rest.removesuffix(" <unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>", rest):
            yield begun.pop(thread) + rest[resumed.end() :]
        else:
            yield rest


def _events(trace: Path, files: Mapping[str, str]) -> Iterator[Event]:
    """Read a trace whose calls are of one file each; descriptors are looked up as they were opened."""
    opened: dict[int, tuple[str, bool]] = {}
    places: dict[int, int] = {}
    for line in _calls(trace):
        found = _CALL.fullmatch(line)
        if not found:
            assert re.search(r"^(\+\+\+|---)| = -1 E", line), f"cannot be read: {line[:200]}"
            continue
        name, words, result = found[1], found[2], int(found[3])
        if name == "openat":
            path = bytes.fromhex(_BYTES.findall(words)[0].replace("\\x", "")).decode()
            opened[result] = files.get(path, "commits"), "O_DSYNC" in words
            places[result] = 0
            continue
        number = int(words.partition(",")[0])
        file, through = opened[number]
        if name == "close":
            del opened[number]
        elif name == "lseek":
            places[number] = result
        elif file == "commits":
            (data,) = _BYTES.findall(words)
            yield Committed(bytes.fromhex(data.replace("\\x", "")).decode())
        elif name in {"fdatasync", "fsync"}:
            yield Synced(file)
        elif name == "fallocate":
            _, mode, start, length = words.split(", ")
            assert mode == "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE", mode
            yield Punched(file, int(start), int(length))
        else:
            assert "write" in name, f"what does {name} do?"
            data = bytes.fromhex("".join(_BYTES.findall(words)).replace("\\x", ""))
            assert len(data) == result, "not all of it is in the trace"
            start = int(words.rpartition(", ")[2]) if name.startswith("p") else places[number]
            places[number] += 0 if name.startswith("p") else result
            yield Written(file, start, data, through)
