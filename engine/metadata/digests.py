"""Finds what a table holds by the first digits of its digest, without reading the table.

Sync.
"""

from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from engine.kv.environment import Transaction
from engine.kv.keys import Part
from engine.kv.table import Record, Table
from engine.oci.short import beginnings, the_one

__all__ = ["full_name"]

R = TypeVar("R", bound=Record)

_CANDIDATES = 100


def full_name(
    table: Table[R], txn: Transaction, *prefix: Part, text: str, name: Callable[[R], str]
) -> str | None:
    """Return the digest in a table that begins as `text`, or None; InvalidArgument for several."""
    found = [
        digest
        for start, size in beginnings(text)
        for digest in islice(
            table.beginning(txn, *prefix, text=start, size=size, name=name), _CANDIDATES
        )
    ]
    return the_one(found, text, table.name)
