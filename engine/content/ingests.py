"""Ingests: opened by one writer at a time, gone on with where one stopped, listed, aborted.

Sync; safe from any thread. Within a process a claim keeps a second writer out, between processes the
record, whose owner is alive or not. An ingest that is announced to be small has no record as long as
its writer is open: if two processes write the same one, the first to commit has made the blob.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.content import discard, extents
from engine.content.holds import Holds
from engine.content.lasting import keep_record
from engine.content.reader import Reader
from engine.content.sharing import borrow
from engine.content.writer import Writer
from engine.errors import AlreadyExists, InvalidArgument, NotFound, Refused, Unavailable, printable
from engine.failpoints import hit
from engine.filters import Filter, fields, matches
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, COUNTERS, INGESTS, INLINE, Ingest, now
from engine.metadata import ledger
from engine.metadata.nodes import INGEST, Node, blob_node
from engine.oci.digest import Digest, parse_digest

__all__ = ["BeingWritten", "Ingests", "Status", "ref_of"]

_POLL_S = 0.02  # another process cannot tell us that it is done


class BeingWritten(Unavailable):
    """Someone else has the ingest open, as the message says."""


@dataclass(frozen=True, slots=True)
class Status:
    """An ingest: its reference, the bytes that are durable, and what is expected of it."""

    ref: str
    offset: int
    total: int | None
    expected: str | None
    started: int
    updated: int


class Ingests:
    """The ingests of one namespace."""

    def __init__(self, meta: Environment, blobs: Environment, holds: Holds, namespace: str) -> None:
        self._meta = meta
        self._blobs = blobs
        self._holds = holds
        self._namespace = namespace

    def open(self, ref: str, lease: str, expected: Digest | None, total: int | None) -> Writer:
        """Return the writer of the ingest `ref`; raises AlreadyExists, BeingWritten."""
        _check(ref, expected, total)
        owners = self._meta.owners
        if not owners.claim(self._namespace, ref):
            raise BeingWritten(f"this process is writing {expected or ref}")
        try:
            new = self._new(ref, lease, expected, total)
            is_new, others_have = self._look(new)
            borrowed = self._borrow(new) if others_have else None
            is_small = total is not None and total <= INLINE
            record = new if borrowed or (is_new and is_small) else self._recorded(new)
            hit("content.ingest.begun")
            return Writer(
                *(self._meta, self._blobs, self._holds, self._namespace, record),
                closed=self._closed,
                borrowed=borrowed,
            )
        except BaseException:
            self._closed(ref)
            raise

    def _closed(self, ref: str) -> None:
        self._meta.owners.release(self._namespace, ref)

    def _look(self, new: Ingest) -> tuple[bool, bool]:
        """Say whether nothing of a blob is here, and whether it is in another namespace then."""
        with self._meta.read() as txn:
            if new.expected and BLOBS.get(txn, self._namespace, new.expected):
                return False, False
            if INGESTS.get(txn, self._namespace, new.ref):
                return False, False
            ledger.check_lease(txn, self._namespace, new.lease)
            return True, bool(new.expected and ledger.holdings(txn, new.expected))

    def _borrow(self, new: Ingest) -> Reader | None:
        """Open what another namespace shares of a blob, if it is what is announced."""
        borrowed = borrow(
            self._meta, self._blobs, self._holds, self._namespace, Digest(str(new.expected))
        )
        if borrowed and new.total not in {None, borrowed.size}:
            borrowed.close()
            return None
        return borrowed

    def _new(self, ref: str, lease: str, expected: Digest | None, total: int | None) -> Ingest:
        return Ingest(
            ref=ref,
            number=0,
            total=total,
            expected=expected,
            owner=self._meta.owners.me,
            lease=lease,
            started=now(),
        )

    def _recorded(self, new: Ingest) -> Ingest:
        with self._meta.write() as txn:
            found = bool(new.expected and BLOBS.get(txn, self._namespace, new.expected))
            if found:
                ledger.pin(txn, self._namespace, new.lease, blob_node(str(new.expected)))
            else:
                record = self._join(txn, new)
        if found:
            raise AlreadyExists(f"blob {new.expected} is in the store")
        return record

    def _join(self, txn: Transaction, new: Ingest) -> Ingest:
        """Go on with what there is of an ingest if that is of the same blob, or begin it anew."""
        old = INGESTS.get(txn, self._namespace, new.ref)
        if old is None:
            return self._number(txn, new)
        if old.owner != new.owner and self._meta.owners.is_alive(old.owner.id):
            raise BeingWritten(f"{old.owner} is writing {new.expected or new.ref}")
        if not self._agree(old, new):
            discard.drop_ingest(txn, self._namespace, new.ref)
            return self._number(txn, new)
        ledger.unpin(txn, self._namespace, old.lease, Node(INGEST, "", old.ref))
        total = old.total if new.total is None else new.total
        record = msgspec.structs.replace(
            new,
            number=old.number,
            total=total,
            expected=new.expected or old.expected,
            started=old.started,
        )
        return keep_record(txn, self._namespace, record)

    def _number(self, txn: Transaction, new: Ingest) -> Ingest:
        record = msgspec.structs.replace(new, number=COUNTERS.next(txn, "blob"))
        return keep_record(txn, self._namespace, record)

    def _agree(self, old: Ingest, new: Ingest) -> bool:
        """Say whether both can be of one blob, as far as they tell: bytes of two are never mixed."""
        if old.expected and new.expected and old.expected != new.expected:
            return False
        if old.total is not None and new.total is not None:
            return old.total == new.total
        return new.total is None or extents.stored_bytes(self._blobs, old.number) <= new.total

    def wait(self, ref: str) -> None:
        """Wait a moment for the writer of an ingest: until it is closed, if it is of this process."""
        if not self._meta.owners.wait_released(self._namespace, ref, seconds=_POLL_S):
            time.sleep(_POLL_S)

    def status(self, ref: str) -> Status:
        """Return how far an ingest is. Raises NotFound."""
        with self._meta.read() as txn:
            record = INGESTS.get(txn, self._namespace, ref)
        if record is None:
            raise _absent(ref)
        return self._status(record)

    def statuses(self, filters: Sequence[Filter] = ()) -> list[Status]:
        """Return how far each ingest is that matches; a filter sees its `ref`."""
        with self._meta.read() as txn:
            records = INGESTS.survey(txn, self._namespace)[0]
        return [
            self._status(record)
            for record in records
            if matches(filters, fields({"ref": record.ref}, {}))
        ]

    def _status(self, record: Ingest) -> Status:
        return Status(
            ref=record.ref,
            offset=extents.stored_bytes(self._blobs, record.number),
            total=record.total,
            expected=record.expected,
            started=record.started,
            updated=record.updated or record.started,
        )

    def abort(self, ref: str) -> None:
        """Drop an ingest and its bytes. Raises NotFound."""
        with self._meta.write() as txn:
            if discard.drop_ingest(txn, self._namespace, ref) is None:
                raise _absent(ref)


def ref_of(digest: str) -> str:
    """Return the ref of a blob of known digest: whoever brings it in goes on with what another left."""
    return f"import-{digest}"


def _check(ref: str, expected: str | None, total: int | None) -> None:
    if not ref:
        raise InvalidArgument("an ingest needs a reference")
    if total is not None and not 0 <= total < 1 << 63:
        raise InvalidArgument(f"no ingest has {total} bytes")
    if expected is not None:
        try:
            parse_digest(expected)
        except Refused as error:
            raise InvalidArgument(str(error)) from None


def _absent(ref: str) -> NotFound:
    return NotFound(f"no ingest {printable(ref)}")
