"""Puts a copy without its free pages in the place of an LMDB file.

Sync. For who has the file alone: others would go on with what is no file any more.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import DataLoss, EngineError, ResourceExhausted, os_errors
from engine.failpoints import hit
from engine.fs.durable import flush, flush_names
from engine.kv.environment import Environment
from engine.kv.opening import UNFINISHED

__all__ = ["compact", "compact_size"]

_MARGIN = 1 << 20  # bytes of the disk that a copy leaves free
_PIECE = 1 << 20


def compact_size(environment: Environment) -> int:
    """Return how many bytes a file has without its free pages."""
    with environment.read() as txn:
        return (environment.used_pages(txn) + 2) * environment.page


def compact(environment: Environment, report: Callable[[int], None]) -> None:
    """Put a copy in the place of a file; `environment` keeps the old one, and has to be closed next.

    A crash leaves the one or the other. ResourceExhausted where the disk has no room for both.
    """
    folder, size = environment.path, compact_size(environment)
    with os_errors(f"store {folder}"):
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize
        if free < size + _MARGIN:
            raise ResourceExhausted(
                f"store {folder}: a copy takes {(size + _MARGIN) >> 20} MiB, and no space is left but "
                f"{free >> 20} MiB; free some, nothing was changed"
            )
        copy = folder / UNFINISHED
        try:
            _copy(environment, os.fspath(copy), size, report)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        hit("compact.flushed")
        # What it says of the old file, as the number of its last transaction, the new one is not.
        (folder / "lock.mdb").unlink()
        hit("compact.unlocked")
        copy.replace(folder / "data.mdb")
        flush_names(folder)
        hit("compact.renamed")


def _copy(environment: Environment, target: str, size: int, report: Callable[[int], None]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(target, flags, 0o600)
    try:
        done = 0
        report(done)
        with _streamed(environment) as source:
            while piece := os.read(source, _PIECE):
                done += len(piece)
                while piece:
                    piece = piece[os.write(file, piece) :]
                hit("compact.written")
                report(done)
        if done != size:
            raise DataLoss(
                f"store {environment.path}: a copy has {done} bytes, not {size}; the store is damaged, "
                "and nothing was changed"
            )
        flush(file)
    finally:
        os.close(file)


@contextmanager
def _streamed(environment: Environment) -> Iterator[int]:
    """Give a pipe that LMDB writes the copy into; whoever stops reading ends that."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    failed: list[EngineError] = []

    def write() -> None:
        try:
            environment.copy_to(sink)
        except EngineError as error:
            failed.append(error)
        finally:
            os.close(sink)

    thread = threading.Thread(target=write, name="copy")
    thread.start()
    try:
        yield source
    finally:
        os.close(source)
        thread.join()
    if failed:
        raise failed[0]
