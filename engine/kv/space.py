"""Gives the freed pages of an LMDB file back to the file system, as holes, beside who reads and writes.

Sync; safe from any thread. LMDB keeps what deletions leave, and its file never shrinks.

Why a hole loses nothing. What transaction K replaced, LMDB lists as freed under K. It writes over such
pages only when K is before the last committed state and before that of every reader (mdb_page_alloc,
mdb_find_oldest). The same pages are given back here, by the same rule, while our turn and LMDB's own
lock of the writer are held: so the last state stays the last, and a reader who comes meanwhile takes it.
The states from K on do not have these pages: that is every reader's, the last, and the one before it,
which is what comes back if a power cut takes the last meta page. Nobody reads them, then, and whoever
takes them writes them first. So a hole may also be there by half, or be lost in a power cut.

The list is read from the file itself (`freelist`), and given up as a whole at anything odd: every page
of the file has to be in use or free, once, before the first hole is made.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import ResourceExhausted, os_errors
from engine.failpoints import hit
from engine.fs.kernel import punch_hole
from engine.kv import freelist
from engine.kv.environment import Environment
from engine.kv.freelist import Meta, Odd, Run
from engine.progress import Report, Step, silent

__all__ = ["GivenBack", "give_back"]

_WORTH = 1 << 20  # bytes below which nothing is done: a commit on the way costs about as many
_LEAST = 16  # pages of a run: holes that are smaller cost the file system more than they give
_PIECE = 256  # pages of one hole
_PART = 1024  # pages of the list at one time
_SLICE_S = 0.008  # of others' time to write
_TRIES = 8
_BEYOND = 1 << 40
_NOTHING = b"nothing"  # a key that is in no table


@dataclass(frozen=True, slots=True)
class GivenBack:
    """How many bytes the file system has again, and why it has not all, if so."""

    bytes: int = 0
    why: str = ""


def give_back(environment: Environment, *, spare: int = 0, report: Report = silent) -> GivenBack:
    """Make holes of freed pages until only `spare` bytes of them take space on the disk.

    Others write between two slices of it. Raises what a write does.
    """
    if environment.unused() - spare < _WORTH:
        return GivenBack()
    with os_errors(f"store {environment.path}"), _opened(environment) as file:
        giving = _Giving(environment, file)
        try:
            wanted = giving.survey() - spare
            if wanted < _WORTH:
                return GivenBack()
            if giving.is_young:
                _age(environment)
            while giving.slice(wanted):
                report(Step.SWEEP, "space", wanted, giving.bytes)
        except Odd as odd:
            why = f"the list of free pages is not as expected: {odd}"
            return GivenBack(giving.bytes, f"{why}; `lamina compact` makes the file anew")
        except ResourceExhausted as error:  # a full disk: the next time
            return GivenBack(giving.bytes, str(error))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return GivenBack(0, "this file system knows no holes; `lamina compact` shrinks the store")
        return GivenBack(giving.bytes, giving.held if giving.bytes < wanted else "")


@contextmanager
def _opened(environment: Environment) -> Iterator[int]:
    file = os.open(environment.path / "data.mdb", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield file
    finally:
        os.close(file)


def _age(environment: Environment) -> None:
    """Commit a state that says the same as the last: what that one freed is then free for all."""
    with environment.write() as txn:
        txn.raw.put(_NOTHING, b"")
        txn.raw.delete(_NOTHING)


class _Giving:
    """One going through the list, in the order of transactions."""

    def __init__(self, environment: Environment, file: int) -> None:
        self.bytes = 0
        self.is_young = False
        self.held = ""
        self._environment = environment
        self._file = file
        self._page = environment.page
        self._at = (0, 0)  # a transaction, and how many of its pages are done

    def survey(self) -> int:
        """Read the whole list, check it, and return how many bytes of the disk it stands for."""
        for _ in range(_TRIES):
            with self._environment.read() as txn:
                meta = self._meta()
                if meta.txnid != txn.raw.id():
                    continue  # someone committed just now
                found: list[Run] = []
                for freed in freelist.records(self._read, meta):
                    of_one = list(freelist.runs(freed.pages, meta))
                    if freed.txnid == meta.txnid:
                        self.is_young = any(run.length >= _LEAST for run in of_one)
                    found += of_one
                together = freelist.merged(found)
                free = sum(run.length for run in together)
                used = self._environment.used_pages(txn) + meta.pages + 2
                if used + free != meta.last + 1:
                    raise Odd(f"{used} pages in use, {free} free, {meta.last + 1} in all")
                return sum(
                    length for run in together if run.length >= _LEAST for _, length in self._data(run)
                )
        return 0

    def slice(self, most: int) -> bool:
        """Make holes for a short time, of so many bytes in all; say whether to go on."""
        with self._environment.write() as txn:
            until = time.monotonic() + _SLICE_S
            meta = self._meta()
            if meta.txnid != txn.raw.id() - 1:
                raise Odd(f"transaction {txn.raw.id()} is on top of {meta.txnid}")
            oldest = self._oldest(meta)
            for found, end in self._chunks(meta, oldest, until):
                for run in freelist.merged(found):
                    if run.length < _LEAST:
                        continue
                    for start, length in self._data(run):
                        punch_hole(self._file, start, length)
                        hit("space.punched")
                        self.bytes += length
                        if self.bytes >= most or self._is_over(until):
                            return self.bytes < most
                self._at = end
                if end[0] < oldest and self._is_over(until):
                    return True
            # XFS keeps blocks behind the end of a file that grew, gigabytes maybe, while it is open.
            punch_hole(self._file, os.fstat(self._file).st_size, _BEYOND)
        return False

    def _is_over(self, until: float) -> bool:
        return time.monotonic() > until or self._environment.is_wanted()

    def _oldest(self, meta: Meta) -> int:
        """Return the oldest state that counts; note who holds one that is older than the last."""
        behind = [reader for reader in self._environment.readers() if reader[1] < meta.txnid]
        if behind:
            pids = ", ".join(str(pid) for pid in sorted({pid for pid, _ in behind}))
            self.held = f"process {pids} still reads what was freed; the next `lamina gc` goes on"
        return min([meta.txnid, *(state for _, state in behind)])

    def _chunks(
        self, meta: Meta, oldest: int, until: float
    ) -> Iterator[tuple[list[Run], tuple[int, int]]]:
        """Yield runs of the list from where it is, fewer when time is up, and where it is after them."""
        found: list[Run] = []
        count = 0
        for freed in freelist.records(self._read, meta, self._at[0]):
            if freed.txnid >= oldest:
                break
            # Others may have taken some since: then a few are passed over, until the next time.
            done = self._at[1] if freed.txnid == self._at[0] else 0
            for start in range(done, len(freed.pages), _PART):
                pages = freed.pages[start : start + _PART]
                found += freelist.runs(pages, meta)
                count += len(pages)
                if count >= _PART or time.monotonic() > until:
                    yield found, (freed.txnid, start + len(pages))
                    found, count = [], 0
        yield found, (oldest, 0)

    def _data(self, run: Run) -> Iterator[tuple[int, int]]:
        """Yield the parts of a run that take space on the disk, none of them large: start, length."""
        at, end = run.first * self._page, (run.first + run.length) * self._page
        while at < end:
            try:
                at = os.lseek(self._file, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but holes from here on
                    raise
                return
            if at < end:
                hole = os.lseek(self._file, at, os.SEEK_HOLE)
                length = min(hole, end, at + _PIECE * self._page) - at
                yield at, length
                at += length

    def _meta(self) -> Meta:
        return freelist.newest(os.pread(self._file, 2 * self._page, 0), self._page)

    def _read(self, number: int, count: int) -> bytes:
        return os.pread(self._file, count * self._page, number * self._page)
