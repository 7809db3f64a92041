"""Reads a whole table in batches, so that a slow reader holds back nobody's pages.

Sync. Each batch has a transaction of its own: what others change meanwhile is seen or not.
"""

from collections.abc import Iterator
from typing import TypeVar

from engine.kv.environment import Environment
from engine.kv.keys import Part
from engine.kv.table import Damaged, Record, Table

__all__ = ["walk"]

R = TypeVar("R", bound=Record)

_BATCH = 1000
_RELEASE_EVERY = 100  # batches read between two calls that give their memory back


def walk(environment: Environment, table: Table[R], *prefix: Part) -> Iterator[R | Damaged]:
    """Yield all records whose keys begin with `prefix`, in key order."""
    after, number = b"", 0
    while after or not number:
        with environment.read() as txn:
            batch, after = table.page(txn, *prefix, after=after, most=_BATCH)
        yield from batch
        number += 1
        if number % _RELEASE_EVERY == 0:
            environment.release_pages()
