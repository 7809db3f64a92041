"""Walks through a table of any size without holding anybody up.

Sync. A read transaction keeps the pages that others free from being used again: in a walk of minutes
the file would grow. This one reads some hundred records at a time. What it yields has each record that
was there all the time, and of those that came or went meanwhile some.
"""

from collections.abc import Iterator
from typing import TypeVar

from engine.kv.environment import Environment
from engine.kv.keys import Part
from engine.kv.table import Damaged, Record, Table

__all__ = ["walk"]

R = TypeVar("R", bound=Record)

_AT_ONCE = 500


def walk(environment: Environment, table: Table[R], *prefix: Part) -> Iterator[R | Damaged]:
    """Yield the records whose keys begin with `prefix`, in key order."""
    last = b""
    while True:
        with environment.read() as txn:
            found, last = table.batch(txn, *prefix, after=last, count=_AT_ONCE)
        yield from found
        if len(found) < _AT_ONCE:
            return
