"""Checks that every folder of snapshots and trash has a record, and moves away those that have none.

Sync. A record comes before its folder and no id is used again, so that a folder is an orphan for ever if
a look after it was seen finds no record.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine import plugins
from engine.errors import FailedPrecondition, os_errors
from engine.failpoints import hit
from engine.fs.attributes import folder_descriptor
from engine.fs.durable import flush_names
from engine.fs.removal import remove_entry
from engine.fsck.findings import Finding, Trouble, What
from engine.fsck.records import Read
from engine.kv.schema import SNAPSHOTS, TRASH
from engine.mounts.table import MountTable
from engine.root import Root

__all__ = ["orphaned_folders"]

_NUMBER = re.compile(r"[1-9][0-9]*")
_OURS = (".probe-",)  # of a backend being tried; what its owner leaves is swept by a collection


def orphaned_folders(root: Root, read: Read) -> Iterator[Trouble]:
    """Yield folders that belong to no snapshot, and what lies in trash without a record."""
    for backend in sorted(root.snapshots.iterdir()):
        if not backend.is_dir() or _is_unknown(root, read, backend.name):
            yield _orphan(root, What.FOLDER, backend, "no snapshotter has it")
            continue
        known = read.ids.get(backend.name, set())
        names = [name for name in os.listdir(backend) if _number(name) not in known]
        named = _named(root, backend.name) if names else set()
        for name in sorted(names):
            if _number(name) not in named and os.path.lexists(backend / name):
                if backend.name in read.torn:
                    detail = "no record has it, and it may be a parent that is missing"
                    yield _orphan(root, What.FOLDER, backend / name, detail, is_sure=False)
                else:
                    yield _orphan(root, What.FOLDER, backend / name, "no record has it")
    dead = sorted(root.trash.iterdir())
    backends = {path.name.rpartition("-")[0] for path in dead}
    named_by = {backend: _named(root, backend) for backend in backends}
    for path in dead:
        backend_name, _, number = path.name.rpartition("-")
        is_named = _number(number) in named_by[backend_name]
        if not is_named and not path.name.startswith(_OURS) and os.path.lexists(path):
            yield _orphan(root, What.TRASH, path, "no record says that it is to be deleted")


def _number(name: str) -> int | None:
    """Return the id of the snapshot whose folder has this name, None if the engine names none so."""
    return int(name) if _NUMBER.fullmatch(name) else None


def _is_unknown(root: Root, read: Read, backend: str) -> bool:
    """Say whether there is no such backend, nor a record that names it."""
    here = (*plugins.names(), *read.ids, *read.torn)
    return backend not in here and not _named(root, backend)


def _orphan(root: Root, what: What, path: Path, detail: str, *, is_sure: bool = True) -> Trouble:
    name = str(path.relative_to(root.path)).encode("utf-8", "surrogateescape")
    shown = name.decode("utf-8", "backslashreplace")
    finding = Finding(what=what, name=shown, detail=detail)
    return Trouble(finding, partial(_remove, root, path) if is_sure else None)


def _named(root: Root, backend: str) -> set[int]:
    """Return the ids that records have by now, those among it that wait to be deleted."""
    with root.meta.read() as txn:
        records = SNAPSHOTS.survey(txn, backend)[0]
        named = {number for record in records for number in record.folders}
        return named | {trash.number for trash in TRASH.survey(txn, "snapshot", backend)[0]}


def _remove(root: Root, path: Path) -> str:
    """Move an orphan to trash and delete it there."""
    if path.parent == root.snapshots and _named(root, path.name):
        raise FailedPrecondition("a record has it by now; check once more")
    if MountTable.read().uses(path):
        raise FailedPrecondition("it is mounted; unmount it first")
    with os_errors(str(path)):
        away = root.trash / f"{path.parent.name}-{path.name}" if path.parent != root.trash else path
        if away != path:
            path.rename(away)
            hit("fsck.folder.moved")
        with folder_descriptor(root.trash) as trash:
            remove_entry(trash, os.fsencode(away.name))
        flush_names(path.parent, root.trash)
    return "removed"
