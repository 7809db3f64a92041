"""Brings blobs from registries into the content store, each as an ingest that is gone on with.

Async; threads write. While one batch is written the next is received; no more is in memory.
A blob that breaks off goes on where it stopped, from any host; what has another digest is dropped, and
asked of another host, or once more if it came in parts.
"""

import math
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from engine import limits
from engine.content.growing import BATCH
from engine.content.ingests import BeingWritten, ref_of
from engine.content.store import ContentStore
from engine.content.writer import Writer
from engine.errors import (
    AlreadyExists,
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    NotFound,
    Refused,
    Unavailable,
)
from engine.fs.room import Room
from engine.kv.schema import EXTENT, Blob
from engine.labels import Labels, with_source
from engine.oci.documents import Descriptor
from engine.oci.mediatypes import is_distributable
from engine.oci.reference import Reference
from engine.phases import Phase, Spent, measured, spend
from engine.progress import Report, Step, silent
from engine.registry.lanes import Lanes
from engine.registry.protocol import BadAnswer, NobodyElse
from engine.registry.ranges import Ranges, first_end
from engine.unpack.arrivals import Arrival

if TYPE_CHECKING:  # which loads httpcore: not for those who have a client handed to them
    from engine.registry.client import Body, Client

__all__ = ["Fetcher", "Sought"]

_HAND_OVER_S = 0.25  # of a slow host whole extents are written so often, so that they are not lost


class _WrongBytes(BadAnswer):
    """What came of a body cannot be the blob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """A blob to bring in: where from, for whose lease, with what labels, and who follows it."""

    reference: Reference
    descriptor: Descriptor
    lease: str
    labels: Labels = field(default_factory=dict)
    data: bytes | None = None
    """All of it, if it had to be read to find out what else is wanted."""
    arrival: Arrival = field(default_factory=Arrival)
    report: Report = silent

    def show(self, step: Step, done: int) -> None:
        """Report a step of the blob."""
        self.report(step, self.descriptor.digest, self.descriptor.size, done)


class Fetcher:
    """Brings the blobs of an image into one namespace."""

    def __init__(
        self,
        client: "Client",
        content: ContentStore,
        folder: Path,
        lanes: Lanes,
    ) -> None:
        """`folder` is on the store's disk, of which some is left free; `lanes` are the engine's."""
        self._client = client
        self._content = content
        self._folder = folder
        self._patience = client.patience
        self._lanes = lanes.of_image()
        self.timings: dict[Phase, Spent] = {}

    async def fetch(self, sought: Sought) -> Blob:
        """Bring a blob in, or pin the one that is here; return its record.

        What was received before an error is kept for the next who wants it. Raises Unavailable,
        NotFound, PermissionDenied, Refused, ResourceExhausted and others.
        """
        descriptor = sought.descriptor
        waiting = ""
        try:
            while True:
                try:
                    blob = await self._fetched(sought)
                    sought.arrival.come(blob)
                    sought.show(Step.KEEP, descriptor.size)
                    return blob
                except BeingWritten as error:
                    if not waiting:
                        sought.show(Step.OTHER, 0)
                    waiting = str(error)
                    sought.report(Step.WAIT, waiting, descriptor.size, 0)
                await trio.to_thread.run_sync(self._wait, sought)
        finally:
            if waiting:
                sought.report(Step.WAIT, waiting, descriptor.size, descriptor.size)
                sought.show(Step.OTHER, descriptor.size)

    def _wait(self, sought: Sought) -> None:
        """Wait a moment for who writes the blob, and show how far that is."""
        self._content.wait(ref_of(sought.descriptor.digest))
        with suppress(NotFound):  # he is done
            sought.show(Step.FETCH, self._content.status(ref_of(sought.descriptor.digest)).offset)

    async def _fetched(self, sought: Sought) -> Blob:
        """Fetch a blob until it is right, or no host is left that could have it right."""
        avoid: set[str] = set()
        was_mixed = False
        failure: Refused | None = None
        while True:
            try:
                async with self._writing(sought) as writer:
                    transfer = _Transfer(self, sought, writer, frozenset(avoid))
                    try:
                        await transfer.run()
                        commit = partial(writer.commit, {**sought.labels, **_source(sought, {})})
                        return await trio.to_thread.run_sync(commit)
                    except (DigestMismatch, _WrongBytes) as error:
                        failure = _blaming(sought, transfer.hosts, error)
                        await trio.to_thread.run_sync(_drop, writer)
            except AlreadyExists:
                return await trio.to_thread.run_sync(self._found, sought)
            except NobodyElse:
                raise failure or NotFound(f"no host has {sought.descriptor.digest}") from None
            except NotFound as error:
                raise _explained(sought.descriptor, error) from None
            # Of what came whole from one host, that host is to blame.
            if transfer.is_from_one:
                avoid |= transfer.hosts
            elif was_mixed:
                raise failure
            was_mixed = was_mixed or not transfer.is_from_one

    @asynccontextmanager
    async def _writing(self, sought: Sought) -> AsyncIterator[Writer]:
        descriptor = sought.descriptor
        begin = partial(
            self._content.ingest,
            ref_of(descriptor.digest),
            lease=sought.lease,
            expected=descriptor.key,
            total=descriptor.size,
        )
        writer = await trio.to_thread.run_sync(begin)
        try:
            yield writer
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(writer.close)

    def _found(self, sought: Sought) -> Blob:
        digest = sought.descriptor.key
        blob = self._content.info(digest)
        if blob.size != sought.descriptor.size:
            raise Refused(
                f"blob {digest} has {blob.size} bytes, its descriptor says {sought.descriptor.size}"
            )
        sought.show(Step.FOUND, blob.size)
        sought.show(Step.FETCH, blob.size)
        changes = {**sought.labels, **_source(sought, blob.labels)}
        return self._content.update(digest, changes) if changes else blob


class _Transfer:
    """What is missing of a blob, on its way into a writer."""

    def __init__(self, fetcher: Fetcher, sought: Sought, writer: Writer, avoid: frozenset[str]) -> None:
        self.hosts: set[str] = set()
        self._fetcher = fetcher
        self._sought = sought
        self._writer = writer
        self._avoid = avoid
        self._began_at = writer.offset
        self._room = Room(fetcher._folder)
        self._error: EngineError | None = None

    @property
    def is_from_one(self) -> bool:
        """Whether all of the blob came from one host, now."""
        return self._began_at == 0 and len(self.hosts) == 1

    async def run(self) -> None:
        """Receive all that is missing, however often it breaks off as long as it gets on."""
        writer, sought = self._writer, self._sought
        self._tell()
        sought.show(Step.FOUND, writer.offset)
        sought.show(Step.FETCH, writer.offset)
        if sought.data is not None:
            await trio.to_thread.run_sync(self._write, sought.data[writer.offset :])
            return
        failed = 0
        in_ranges = True
        await trio.to_thread.run_sync(self._make_room, sought.descriptor.size - writer.offset)
        while (offset := writer.offset) < (size := sought.descriptor.size):
            opening = self._fetcher._client.blob(
                *(sought.reference, sought.descriptor, offset),
                end=first_end(offset, size) if in_ranges else None,
                avoid=self._avoid,
                admit=self._fetcher._lanes.lane,
            )
            async with opening as body:
                self.hosts.add(body.host)
                broken = await self._received(body)
                # Each time that one breaks off others are thrown away.
                in_ranges = broken is None and body.is_as_asked
            if broken is None:
                continue
            # Half of what was missing is enough, too: that cannot go on for long.
            enough = min(limits.PROGRESS_BYTES, (size - offset) // 2)
            failed = 1 if writer.offset - offset >= max(1, enough) else failed + 1
            wait = self._fetcher._patience.wait(failed, broken, random.random())
            if wait is None:
                raise broken
            await trio.sleep(wait)

    async def _received(self, body: "Body") -> Unavailable | None:
        """Write what comes of a body; return why it broke off, if it did."""
        send, receive = trio.open_memory_channel[bytearray](0)
        broken: Unavailable | BadAnswer | None = None
        lanes, size = self._fetcher._lanes, self._sought.descriptor.size
        async with trio.open_nursery() as nursery, send:
            nursery.start_soon(self._write_all, receive)
            ranges = Ranges(body, self._writer.offset, size, lanes, nursery)
            try:
                broken = await self._batched(ranges, send)
            except trio.BrokenResourceError:
                pass  # writing failed
            finally:
                ranges.close()
        if self._error:
            raise self._error
        if isinstance(broken, BadAnswer):
            raise _WrongBytes(str(broken))
        return broken

    async def _batched(
        self, body: Ranges, send: trio.MemorySendChannel[bytearray]
    ) -> Unavailable | BadAnswer | None:
        """Pass a body on in batches that end where extents end."""
        received = self._writer.offset
        lead = received % EXTENT
        batch = bytearray()
        since = -math.inf  # the first extent goes on at once: who applies it has nothing to do yet
        while True:
            broken, asked = None, trio.current_time()
            try:
                chunk = await body.read()
            except (Unavailable, BadAnswer) as error:
                broken, chunk = error, b""
            spend(Phase.FETCH, Spent(0.0, trio.current_time() - asked), self._fetcher.timings)
            batch += chunk
            if (received + len(chunk)) // EXTENT > received // EXTENT or not chunk:
                self._sought.show(Step.FETCH, received + len(chunk))
            received += len(chunk)
            is_due = trio.current_time() - since >= _HAND_OVER_S
            if not chunk:
                end = len(batch)
            elif len(batch) + lead >= (EXTENT if is_due else BATCH):
                end = (len(batch) + lead) // EXTENT * EXTENT - lead
            else:
                continue
            if end:
                rest = batch[end:]
                del batch[end:]
                await send.send(batch)
                batch, lead, since = rest, 0, trio.current_time()
            if not chunk:
                return broken

    async def _write_all(self, receive: trio.MemoryReceiveChannel[bytearray]) -> None:
        async with receive:
            async for batch in receive:
                try:
                    await trio.to_thread.run_sync(self._write, batch)
                except EngineError as error:
                    self._error = error
                    return
                self._tell()

    def _write(self, batch: bytes | bytearray) -> None:
        self._make_room(len(batch))
        with measured(Phase.FETCH, self._fetcher.timings):
            self._writer.write(memoryview(batch))

    def _make_room(self, size: int) -> None:
        if growth := self._fetcher._content.growth(size):
            self._room.take(growth)

    def _tell(self) -> None:
        self._sought.arrival.tell(*self._writer.durable)


def _source(sought: Sought, known: Labels) -> dict[str, str]:
    """Return the label that says where a blob can be had, so that a push need not send it there."""
    return with_source(known, sought.reference.domain, sought.reference.path)


def _drop(writer: Writer) -> None:
    """Drop what a writer wrote, unless it did that itself."""
    with suppress(FailedPrecondition):
        writer.abort()


def _blaming(sought: Sought, hosts: Iterable[str], error: Refused) -> Refused:
    """Say of bytes that are wrong who sent them."""
    if not isinstance(error, DigestMismatch):
        return error
    sent = " and ".join(sorted(hosts)) or "someone"
    what = f"{sought.descriptor.digest} of {sought.reference}, as {sent} sent it,"
    return DigestMismatch(what, error.expected, error.actual)


def _explained(descriptor: Descriptor, error: NotFound) -> NotFound:
    """Say of a layer that is not to be distributed why it may be missing."""
    if not is_distributable(descriptor.media_type):
        return NotFound(f"{error}: its owner gives it out elsewhere, and lamina follows no such URLs")
    return error
