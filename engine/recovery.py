"""What the first to open a store to write does after someone died in it, or the machine went down.

Sync. Nobody needs it to be safe: what dead work made is held by its lease alone, and no folder is ever
without a record. So it is quick, bounded in time, and nobody waits for whoever is at it; only what was
committed without being flushed has to be checked first (`engine.doubts`):

    emptied    what was dropped is deleted; what there is no time for waits for a collection
    checked    after the machine went down: that the snapshots committed last are there, and as large
    swept      what dead processes left mounted, where they tried a backend
    closed     the files of dead owners go, and the boot is noted: from now on the store is in order

Left for others: dead leases and what they made to a collection, as the next import goes on with blobs
that were half written; folders without records to `fsck --repair`, as no crash makes any.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine import limits, plugins
from engine.content.store import ContentStore
from engine.doubts import flush_waiting, settle_doubts
from engine.errors import DataLoss, EngineError, NotFound, os_errors
from engine.failpoints import hit
from engine.fs.durable import flush
from engine.fs.locks import lock
from engine.kv.schema import SNAPSHOTS, TRASH, Snapshot
from engine.metadata import marks
from engine.processes import boot_id
from engine.root import Root
from engine.snapshots import Kind

__all__ = ["is_in_order", "recover"]

_log = logging.getLogger(__name__)

_BOOT = "boot"
_LAST_NS = 300 * 10**9  # what was committed so long before the end is looked at


def is_in_order(root: Root) -> bool:
    """Say whether everyone who had a store open to write closed it, in this boot of the machine."""
    return _noted_boot(root) == _this_boot() and not root.owners.any_dead()


def _this_boot() -> str:
    try:
        return boot_id()
    except OSError:  # no /proc: then every boot is like the last
        return "unknown"


def _noted_boot(root: Root) -> str:
    try:
        return (root.path / _BOOT).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""


def recover(root: Root, passed: Callable[[], None] = lambda: None) -> None:
    """Put a store in order, if it is not; what cannot be done now is left for the next time.

    `passed` is called often where it takes long, and may end it.
    """
    try:
        with os_errors(f"root {root.path}"):
            if not is_in_order(root):
                with _alone(root) as is_mine:
                    if is_mine:
                        _recover(root)
            settle_doubts(root, passed)
            flush_waiting(root, after_s=limits.FLUSH_AFTER_S)
    except EngineError as error:  # who opens a store wants to work: with a full disk to free it
        _log.warning("the store is not in order yet: %s", error)


@contextmanager
def _alone(root: Root) -> Iterator[bool]:
    """Say whether nobody else is at it, and hold that for the length of a block."""
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(root.path / "recovery", flags, 0o600)
    try:
        yield lock(file, alone=True)
    finally:
        os.close(file)


def _recover(root: Root) -> None:
    until = time.monotonic() + limits.RECOVERY_S
    hit("recover.begun")
    _empty(root, until)
    hit("recover.emptied")
    if _noted_boot(root) != _this_boot():
        _check_last(root, until)
    hit("recover.checked")
    plugins.sweep(root, until)
    hit("recover.swept")
    marks.end_dead(root.meta)
    root.owners.sweep()
    fresh = root.path / f"{_BOOT}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(fresh, flags, 0o600), "w", encoding="ascii") as opened:
        opened.write(f"{_this_boot()}\n")
        opened.flush()
        flush(opened.fileno())
    fresh.replace(root.path / _BOOT)


def _empty(root: Root, until: float) -> None:
    """Delete what was dropped."""
    with root.meta.read() as txn:
        backends = list(TRASH.branches(txn, "snapshot"))
        has_bytes = TRASH.any(txn, "blob")
    for backend in backends:
        try:
            place = plugins.create(root, backend, "default")
            place.cleanup(seconds=until - time.monotonic())
        except EngineError as error:  # its files wait
            _log.warning("what was removed from %s stays for now: %s", backend, error)
    if has_bytes:
        content = ContentStore(root.meta, root.blobs, "default")
        content.cleanup(seconds=until - time.monotonic())


def _check_last(root: Root, until: float) -> None:
    """Look whether what was committed last is on disk, which a disk that lies may have lost."""
    for backend, namespace, record in _last(root, until):
        if time.monotonic() > until:
            return
        try:
            found = plugins.create(root, backend, namespace).measure(record.key).inodes
            wrong = "" if found == record.inodes else f"it has {found} files, not {record.inodes}"
        except NotFound:
            continue
        except DataLoss as error:
            wrong = str(error)
        if wrong:
            _log.warning(
                "snapshot %s of %s is damaged: %s; run `lamina fsck --repair`",
                record.key,
                backend,
                wrong,
            )


def _last(root: Root, until: float) -> list[tuple[str, str, Snapshot]]:
    """Return the snapshots that were committed last, the newest first: backends, namespaces, records.

    All records are looked through, some 200,000 a second; in a larger store as far as time goes.
    """
    found: list[tuple[str, str, Snapshot]] = []
    newest = 0
    for batch in SNAPSHOTS.batches(root.meta):
        for (backend, namespace, *_), record in batch:
            if record.kind == Kind.COMMITTED and record.created > newest - _LAST_NS:
                newest = max(newest, record.created)
                found.append((backend, namespace, record))
        found = [one for one in found if one[2].created > newest - _LAST_NS]
        if time.monotonic() > until:
            break
    return sorted(found, key=lambda one: one[2].created, reverse=True)
