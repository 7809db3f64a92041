"""Tells whether an LMDB file is as long as what it holds: to read a map beyond the end is a SIGBUS.

Sync.
"""

import os
from pathlib import Path

from engine.errors import DataLoss
from engine.kv import freelist

__all__ = ["check_length"]

_UNWRITTEN = 1 << 12  # pages: a transaction has no more


def check_length(data: Path, *, page: int) -> None:
    """Raise DataLoss if a file was cut.

    Pages at its end that the last transaction took and gave back were never written (P_LOOSE, mdb.c):
    they are free, and not missed.
    """
    file = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def read(number: int, count: int) -> bytes:
            return os.pread(file, count * page, number * page)

        try:
            meta = freelist.newest(read(0, 2), page)
        except freelist.Odd:  # LMDB took it, and says more when it meets what is wrong
            return
        # Asked for after the state was read, which is written last.
        first = os.fstat(file).st_size // page
        missing = set(range(first, meta.last + 1)) if meta.last - first < _UNWRITTEN else {first}
        if missing and not missing <= _free(read, meta):
            raise DataLoss(
                f"{data} was cut, at {first} of {meta.last + 1} pages; restore it from a backup"
            )
    finally:
        os.close(file)


def _free(read: freelist.Pages, meta: freelist.Meta) -> set[int]:
    try:
        return {
            number
            for freed in freelist.records(read, meta)
            for run in freelist.runs(freed.pages, meta)
            for number in range(run.first, run.first + run.length)
        }
    except freelist.Odd:
        return set()
