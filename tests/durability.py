"""Records the durable steps of what a process does to a store, in their order.

Sync. Each kind of step has one seam: LMDB commits go through `Environment.write`, the rest through
`os` and libc, which flush nothing then: on a busy disk that takes seconds. A step is a line of text, as
docs/on-disk.md writes it:

    meta +blob -ingest       a transaction of meta.lmdb put and deleted records of these tables;
                             `~` is a record that was there and is another now
    blobs +extent            the same of blobs.lmdb
    flush tree, folder       fsync of these folders of a snapshot; `file` is any other file
    syncfs                   of the file system that holds the snapshots
    rename folder trash      within the store
    files +tree -outline     names were made and removed since the step before: nothing orders these
                             but the steps around them
    mounted, unmounted       the same of mounts below `watched`
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.fs import kernel
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import COUNTERS

__all__ = ["Recorder", "matches", "recorded"]

_SINGULAR = {"lease_items": "pin", "trash": "trash"}
_DERIVED = {"mentions", "holdings", "layers", "touched", "clocks"}  # written with others that are shown
_PLACES = (  # of a store, by what a step calls them; the first that fits counts
    (r"snapshots/[a-z]+/\d+/fs", "tree"),
    (r"snapshots/[a-z]+/\d+/([a-z]+)\.new", "new"),
    (r"snapshots/[a-z]+/\d+/([a-z]+)", r"\1"),
    (r"snapshots/[a-z]+/\d+", "folder"),
    (r"snapshots/[a-z]+", "backend"),
    (r"snapshots", "snapshots"),
    (r"trash/[^/]+", "removed"),
    (r"trash", "trash"),
    (r"(meta|blobs)\.lmdb", r"\1"),
    (r"(meta|blobs)\.lmdb/(data\.new|making/data\.mdb)", "new"),
    (r"(meta|blobs)\.lmdb/data\.mdb", r"\1 data"),
    (r"format.*", "format"),
    (r"reserve", "reserve"),
    (r"\.", "root"),
)


class Recorder:
    """What was done so far, oldest first, in `steps`."""

    def __init__(self, root: Path, watched: Path) -> None:
        self.steps: list[str] = []
        self._root = Path(os.path.realpath(root))
        self._watched = watched
        self._lock = threading.RLock()
        self._seen = self._names()

    # -- the world, between two steps ---------------------------------------------------------

    def _names(self) -> dict[str, str]:
        """Return what there is in a store but LMDB's: paths, and what a step calls them."""
        found = {
            str(path): name
            for pattern in (
                "reserve",
                "format",
                "snapshots/*",
                "snapshots/*/*",
                "snapshots/*/*/*",
                "trash/*",
            )
            for path in self._root.glob(pattern)
            if (name := self._name(path))
        }
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        for line in mounts.splitlines():
            if line.split()[4].startswith(f"{self._watched}/"):
                found[line] = "mount"
        return found

    def _name(self, path: Path) -> str:
        if not path.is_relative_to(self._root):
            return "parent" if self._root.is_relative_to(path) else ""
        below = str(path.relative_to(self._root))
        for pattern, name in _PLACES:
            found = re.fullmatch(pattern, below)
            if found:
                return found.expand(name)
        return ""

    def _note_names(self) -> None:
        seen, self._seen = self._seen, self._names()
        made = {self._seen[path] for path in self._seen.keys() - seen.keys()}
        gone = {seen[path] for path in seen.keys() - self._seen.keys()}
        for names, step in ((made, "mounted"), (gone, "unmounted")):
            if "mount" in names:
                names.discard("mount")
                self.steps.append(step)
        made.discard("new")  # it is a step when it gets its name
        if gone & {"folder", "removed"}:  # what is in it goes with it
            gone -= {"tree", "work", "outline", "sealed", "settling"}
        changes = [*(f"+{name}" for name in sorted(made)), *(f"-{name}" for name in sorted(gone))]
        if changes:
            self.steps.append(f"files {' '.join(changes)}")

    def note_names(self) -> None:
        """Add what happened to names since the last step."""
        with self._lock:
            self._note_names()

    # -- the seams ----------------------------------------------------------------------------

    def flushed(self, file: int) -> None:
        name = self._name(Path(os.readlink(f"/proc/self/fd/{file}"))) or "file"
        with self._lock:
            if self.steps and self.steps[-1].startswith("flush "):
                self.steps[-1] += f", {name}"
            else:
                self.steps.append(f"flush {name}")

    def synced(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        inside = path.is_relative_to(self._root / "snapshots")
        self.steps.append("syncfs" if inside else f"syncfs of {path}")

    def renamed(self, source: Any, target: Any) -> None:
        names = [self._name(Path(os.fsdecode(path))) for path in (source, target)]
        if all(names):
            names = [name for name in names if name != "new"]
            self.steps.append(f"rename {' '.join(dict.fromkeys(names))}")
            self._seen = self._names()

    def committed(self, environment: Environment, before: "_Content", after: "_Content") -> None:
        name = environment.path.name.removesuffix(".lmdb")
        changes = []
        for table in after:
            old, new = before.get(table, {}), after[table]
            changes += ["+" + _one(table)] if new.keys() - old.keys() else []
            changes += ["-" + _one(table)] if old.keys() - new.keys() else []
            both = old.keys() & new.keys()
            changes += ["~" + _one(table)] if any(old[key] != new[key] for key in both) else []
        if changes:
            self.steps.append(f"{name} {' '.join(sorted(changes))}")


_Content = dict[str, dict[bytes, bytes]]


def _one(table: str) -> str:
    return _SINGULAR.get(table, table.removesuffix("s"))


def _content(environment: Environment, txn: Transaction) -> _Content:
    """Return all records; of a file without tables, the keys of its extents and their lengths."""
    if not environment._tables:
        with txn.raw.cursor() as cursor:
            return {"extents": {bytes(key): b"%d" % len(value) for key, value in cursor}}
    found: _Content = {}
    for table in environment._tables:
        if table != COUNTERS.name and table not in _DERIVED:
            with txn.raw.cursor(db=txn.databases[table]) as cursor:
                found[table] = {bytes(key): bytes(value) for key, value in cursor}
    return found


@contextmanager
def recorded(
    monkeypatch: pytest.MonkeyPatch, root: Path, watched: Path = Path("/nowhere")
) -> Iterator[Recorder]:
    """Record what the block does to the store at `root`, and to mounts below `watched`."""
    recorder = Recorder(root, watched)
    write, rename, replace = Environment.write, os.rename, os.replace

    @contextmanager
    def writing(self: Environment) -> Iterator[Transaction]:
        with write(self) as txn:
            before = _content(self, txn)
            yield txn
            after = _content(self, txn)
            recorder.note_names()
        recorder.committed(self, before, after)

    def flushing(file: int) -> None:
        recorder.note_names()
        recorder.flushed(file)

    def syncing(file: Any) -> int:
        recorder.note_names()
        recorder.synced(file.value)
        return 0

    def renaming(source: Any, target: Any, **options: Any) -> None:
        recorder.note_names()
        rename(source, target, **options)
        recorder.renamed(source, target)

    def replacing(source: Any, target: Any, **options: Any) -> None:
        recorder.note_names()
        replace(source, target, **options)
        recorder.renamed(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "write", writing)
        patch.setattr(os, "fsync", flushing)
        patch.setattr(os, "fdatasync", flushing)
        patch.setattr(kernel._libc, "syncfs", syncing)
        patch.setattr(os, "rename", renaming)
        patch.setattr(os, "replace", replacing)
        try:
            yield recorder
        finally:
            recorder.note_names()


def matches(steps: list[str], written: str) -> bool:
    """Say whether steps are as docs/on-disk.md writes them: `x`, (`x`, `y`)… for once or more."""
    pattern = ""
    for token in re.findall(r"`([^`]+)`(…?)|(\()|(\)…)", written):
        step, more, opened, closed = token
        if step:
            pattern += f"(?:{re.escape(step)}\n){'+' if more else ''}"
        elif opened:
            pattern += "(?:"
        elif closed:
            pattern += ")+"
    return re.fullmatch(pattern, "".join(f"{step}\n" for step in steps)) is not None
