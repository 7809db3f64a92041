"""A typed table: records found by composite keys.

Sync. A table holds no state: every call names the transaction that it works in, so that changes to
several tables commit together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from engine.errors import DataLoss
from engine.kv import keys
from engine.kv.environment import Environment, Transaction
from engine.kv.keys import Part

__all__ = ["Counter", "Damaged", "Record", "Table"]

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
_PAGE = 1000  # records read in one transaction
# Pages read between two calls that give their memory back: each look maps sixteen pages of the file.
_RELEASE_EVERY = 10


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of what tables hold; `version` is that of the record's own layout."""

    version: int = 1


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Damaged:
    """A record that cannot be read: the last part of its key, and why."""

    name: str
    error: str


class Table(Generic[R]):
    """Records of one kind under keys of a fixed number of parts."""

    def __init__(self, name: str, record: type[R]) -> None:
        self.name = name
        self._decoder = msgspec.msgpack.Decoder(record)
        self._encoder = msgspec.msgpack.Encoder()

    def get(self, txn: Transaction, *key: Part) -> R | None:
        """Return the record under `key`, or None."""
        if self.name not in txn.databases:  # opened to read, and nothing was ever in it
            return None
        raw = txn.raw.get(keys.encode(key), db=txn.databases[self.name])
        return None if raw is None else self._decode(raw)

    def put(self, txn: Transaction, record: R, *key: Part) -> None:
        """Write `record` under `key`, over what is there."""
        value = self._encoder.encode(record)
        txn.changes += 1
        txn.raw.put(keys.encode(key), value, db=txn.databases[self.name])

    def delete(self, txn: Transaction, *key: Part) -> bool:
        """Remove the record under `key`; say whether there was one."""
        found = bool(txn.raw.delete(keys.encode(key), db=txn.databases[self.name]))
        txn.changes += found
        return found

    def scan(self, txn: Transaction, *prefix: Part) -> list[R]:
        """Return all records whose keys begin with `prefix`, in key order."""
        return list(self.each(txn, *prefix))

    def each(self, txn: Transaction, *prefix: Part) -> Iterator[R]:
        """Yield what `scan` returns; nothing may be written to the table meanwhile."""
        return (self._decode(value) for _, value in self._items(txn, keys.encode(prefix)))

    def survey(self, txn: Transaction, *prefix: Part) -> tuple[list[R], list[Damaged]]:
        """Return what `scan` does, and beside it the records that cannot be read."""
        found: list[R] = []
        damaged: list[Damaged] = []
        for record in self.survey_each(txn, *prefix):
            if isinstance(record, Damaged):
                damaged.append(record)
            else:
                found.append(record)
        return found, damaged

    def survey_each(self, txn: Transaction, *prefix: Part) -> Iterator[R | Damaged]:
        """Yield what `survey` returns; nothing may be written to the table meanwhile."""
        decode = self._decoder.decode
        for key, value in self._items(txn, keys.encode(prefix)):
            try:
                record: R | Damaged = decode(value)
            except _UNREADABLE:
                record = self._readable(key, value)
            yield record

    def entries(self, txn: Transaction) -> Iterator[tuple[list[str], R | Damaged]]:
        """Yield all records, each with the parts of its key; as `survey_each`."""
        for key, value in self._items(txn, b""):
            yield keys.names_in(bytes(key)), self._readable(key, value)

    def pages(
        self, environment: Environment, *prefix: Part
    ) -> Iterator[list[tuple[bytes, R | Damaged]]]:
        """Yield what `survey_each` does, each with its key, some from one transaction at a time.

        So nothing is held up, however long each takes; what comes or goes meanwhile may be there or not.
        """
        start, number = keys.encode(prefix), 0
        after: bytes | None = b""
        while after is not None:
            page: list[tuple[bytes, R | Damaged]] = []
            with environment.read() as txn:
                at, after = after, None
                for key, value in self._items(txn, start, at):
                    page.append((bytes(key), self._readable(bytes(key), value)))
                    if len(page) == _PAGE:
                        after = bytes(key)
                        break
            yield page
            number += 1
            if number % _RELEASE_EVERY == 0:
                environment.release_pages()

    def walk(self, environment: Environment, *prefix: Part) -> Iterator[R | Damaged]:
        """Yield the records of `pages`."""
        for page in self.pages(environment, *prefix):
            yield from (record for _, record in page)

    def batches(self, environment: Environment) -> Iterator[list[tuple[list[str], R]]]:
        """Yield what `entries` does of records that can be read, as `pages`."""
        for page in self.pages(environment):
            yield [
                (keys.names_in(key), record) for key, record in page if not isinstance(record, Damaged)
            ]

    def count(self, txn: Transaction) -> int:
        """Return how many records there are, readable or not."""
        if self.name not in txn.databases:
            return 0
        return int(txn.raw.stat(txn.databases[self.name])["entries"])

    def numbers(self, txn: Transaction) -> Iterator[int]:
        """Yield the keys of a table whose keys are numbers, whatever is under them."""
        return (int.from_bytes(key, "big") for key, _ in self._items(txn, b""))

    def any(self, txn: Transaction, *prefix: Part) -> bool:
        """Say whether a key begins with `prefix`."""
        return next(self._items(txn, keys.encode(prefix)), None) is not None

    def branches(self, txn: Transaction, *prefix: Part) -> Iterator[str]:
        """Yield, each once, what comes after `prefix` in the keys: a step for each, whatever is below.

        Nothing may be written to the table meanwhile.
        """
        if self.name not in txn.databases:
            return
        start = keys.encode(prefix)
        with txn.raw.cursor(db=txn.databases[self.name]) as cursor:
            found = cursor.set_range(start) if start else cursor.first()
            while found and bytes(cursor.key()[: len(start)]) == start:
                part = keys.first(bytes(cursor.key()[len(start) :]))
                yield keys.names_in(part)[0]
                found = cursor.set_range(keys.after(start + part))

    def beginning(
        self, txn: Transaction, *prefix: Part, text: str, size: int, name: Callable[[R], str]
    ) -> Iterator[str]:
        """Yield the last parts of keys that have `size` bytes and begin as `text`.

        `name` returns it for a record whose key does not tell, being too long.
        """
        for key, value in self._items(txn, keys.opening(prefix, text, size)):
            found = keys.names_in(bytes(key))[-1]
            if size > keys.LONGEST:
                try:
                    found = name(self._decode(value))
                except DataLoss:
                    continue
            if len(found) == size and found.startswith(text):
                yield found

    def clear(self, txn: Transaction, *prefix: Part, most: int | None = None) -> bool:
        """Remove all records whose keys begin with `prefix`, readable or not, or so many at most.

        Say whether that was all.
        """
        start = keys.encode(prefix)
        with txn.raw.cursor(db=txn.databases[self.name]) as cursor:
            while cursor.set_range(start) and bytes(cursor.key()[: len(start)]) == start:
                if most == 0:
                    return False
                most = None if most is None else most - 1
                txn.changes += 1
                cursor.delete()
        return True

    def drop_damaged(self, txn: Transaction, *prefix: Part) -> None:
        """Remove the records that cannot be read whose keys begin with `prefix`."""
        items = self._items(txn, keys.encode(prefix))
        damaged = [bytes(key) for key, value in items if isinstance(self._readable(key, value), Damaged)]
        for key in damaged:
            txn.raw.delete(key, db=txn.databases[self.name])

    def _items(
        self, txn: Transaction, start: bytes, after: bytes = b""
    ) -> Iterator[tuple[bytes | memoryview, bytes | memoryview]]:
        if self.name not in txn.databases:
            return
        size = len(start)
        first = after + b"\0" if after else start  # no key lies between one and itself with a zero
        with txn.raw.cursor(db=txn.databases[self.name]) as cursor:
            if cursor.set_range(first) if first else cursor.first():
                for key, value in cursor.iternext():
                    if key[:size] != start:
                        return
                    yield key, value

    def _readable(self, key: bytes | memoryview, value: bytes | memoryview) -> R | Damaged:
        try:
            return self._decode(value)
        except DataLoss as error:
            return Damaged(keys.names_in(bytes(key))[-1], str(error))

    def _decode(self, raw: bytes | memoryview) -> R:
        try:
            return self._decoder.decode(raw)
        except _UNREADABLE as error:
            raise DataLoss(f"a record of {self.name} cannot be read: {error}") from error


class _Count(Record, frozen=True):
    value: int


class Counter:
    """Numbers that are given out once, over the whole life of a store."""

    def __init__(self, table: str) -> None:
        self.name = table
        self._table = Table(table, _Count)

    def next(self, txn: Transaction, sequence: str) -> int:
        """Return the next number of `sequence`, from 1."""
        last = self._table.get(txn, sequence)
        value = (last.value if last else 0) + 1
        self._table.put(txn, _Count(value=value), sequence)
        return value

    def last(self, txn: Transaction, sequence: str) -> int:
        """Return the last number given out, 0 if none was. Raises DataLoss."""
        found = self._table.get(txn, sequence)
        return found.value if found else 0

    def set(self, txn: Transaction, sequence: str, value: int) -> None:
        """Let `value` be the last number given out, whatever the table says."""
        self._table.put(txn, _Count(value=value), sequence)
