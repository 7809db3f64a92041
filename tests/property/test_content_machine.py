"""The content store against dictionaries: any order of calls in two namespaces, with readers open, and
the root closed in between as a crash would."""

import msgspec
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import (
    AlreadyExists,
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    NotFound,
    Refused,
    Unavailable,
)
from engine.failpoints import armed
from engine.kv.schema import BLOBS, EXTENT, INGESTS, INLINE, SMALL, TRASH
from engine.metadata import ledger
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
from tests.engine.image_files import extents
from tests.filesystems import shared_memory

SPACES = ("default", "other")
REFS = st.sampled_from(["a", "b", "b" * 300])
SIZES = st.sampled_from([0, 1, 7, INLINE, INLINE + 1, EXTENT - 1, EXTENT, EXTENT + 1])
FILLS = st.sampled_from([b"x", b"y"])
LABELS = st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["", "1", "2"]))


class _Ingest:
    """What the model knows of an ingest: all bytes given to it, and the writer if one is open.

    `recorded` says whether others can see it, `shared` whether its bytes are another namespace's,
    `durable` how many bytes a crash leaves.
    """

    def __init__(self, expected, total, fill):
        self.expected, self.total, self.fill = expected, total, fill
        self.data, self.durable = b"", 0
        self.recorded = self.shared = False
        self.writer = None

    @property
    def is_small(self):
        return self.total is not None and self.total <= INLINE

    def wrote(self):
        self.durable = max(self.durable, len(self.data) // EXTENT * EXTENT)

    def agrees(self, expected, total):
        if None not in {self.expected, expected} and self.expected != expected:
            return False
        if None not in {self.total, total}:
            return self.total == total
        return total is None or self.durable <= total


class ContentMachine(RuleBasedStateMachine):
    """Blobs by digest and ingests by reference, of two namespaces that share bytes."""

    def __init__(self):
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.blobs = {space: {} for space in SPACES}
        self.ingests = {}
        self.readers = []
        self.open()

    def open(self):
        self.root = Root(self.folder / "root")
        self.spaces = {space: Stores(self.root, space, Platform()) for space in SPACES}
        self.stores = self.spaces["default"]

    def content(self, space):
        return self.spaces[space].content

    def teardown(self):
        self.bytes_are_as_in_the_model()
        self.crash()
        self.root.close()
        self.memory.__exit__(None, None, None)

    def writing(self):
        return [key for key, ingest in self.ingests.items() if ingest.writer]

    def stored(self):
        return [(space, digest) for space in SPACES for digest in sorted(self.blobs[space])]

    def drop(self, key):
        del self.ingests[key]

    # -- ingests --------------------------------------------------------------------------

    @rule(space=st.sampled_from(SPACES), ref=REFS, size=st.none() | SIZES, fill=st.none() | FILLS)
    def begin(self, space, ref, size, fill):
        expected = digest_of((fill or b"") * (size or 0)) if fill else None
        old = self.ingests.get((space, ref))
        try:
            writer = self.content(space).ingest(ref, lease="", expected=expected, total=size)
        except Unavailable:
            assert old is not None
            assert old.writer is not None
            return
        except AlreadyExists:
            assert expected in self.blobs[space]
            return
        assert old is None or old.writer is None
        assert expected not in self.blobs[space]
        ingest = self.begun(space, old, expected, size, fill)
        ingest.writer = writer
        self.ingests[space, ref] = ingest
        assert writer.offset == len(ingest.data)
        assert writer.digest == digest_of(ingest.data)

    def begun(self, space, old, expected, size, fill):
        if old and old.agrees(expected, size):
            event(f"goes on with {'something' if old.data else 'nothing'}")
            old.expected, old.total = expected or old.expected, old.total if size is None else size
            old.fill = fill or old.fill
            return old
        ingest = _Ingest(expected, size, fill)
        others = self.blobs[SPACES[space == SPACES[0]]]
        if not old and expected in others and size in {None, len(others[expected][0])}:
            event("shares the bytes of another namespace")
            ingest.shared = True
            ingest.data = others[expected][0]
        else:
            ingest.recorded = bool(old) or not ingest.is_small
        return ingest

    @precondition(writing)
    @rule(data=st.data(), size=SIZES, fill=FILLS)
    def write(self, data, size, fill):
        key = data.draw(st.sampled_from(self.writing()))
        ingest = self.ingests[key]
        rest = max(0, (ingest.total or 0) - len(ingest.data))
        if rest and data.draw(st.integers(0, 3)):  # most announcements come true
            size, fill = rest, ingest.fill or fill
        fits = ingest.total is None or len(ingest.data) + size <= ingest.total
        try:
            ingest.writer.write(fill * size)
        except Refused:
            assert not fits
            self.drop(key)
            return
        assert fits
        if size and ingest.shared:
            self.unshared(ingest)
        ingest.data += fill * size
        if not ingest.shared:
            ingest.wrote()
        event("wrote to an announced size" if len(ingest.data) == ingest.total else "wrote")
        assert ingest.writer.offset == len(ingest.data)

    def unshared(self, ingest):
        event("has bytes of its own from now on")
        ingest.shared = False
        ingest.recorded = not ingest.is_small

    @precondition(writing)
    @rule(data=st.data())
    def truncate(self, data):
        ingest = self.ingests[data.draw(st.sampled_from(self.writing()))]
        ingest.writer.truncate()
        if ingest.shared:
            self.unshared(ingest)
        ingest.data, ingest.durable = b"", 0
        assert ingest.writer.offset == 0

    @precondition(writing)
    @rule(
        data=st.data(),
        labels=LABELS,
        fault=st.sampled_from(["", "", "before", "after"]),
        size=st.sampled_from([None, None, None, True, False]),
    )
    def commit(self, data, labels, fault, size):
        key = data.draw(st.sampled_from(self.writing()))
        labels = {name: value for name, value in labels.items() if value}
        ingest = self.ingests[key]
        digest = digest_of(ingest.data)
        told = None if size is None else len(ingest.data) + (not size)
        if (
            ingest.total not in {None, len(ingest.data)}
            or ingest.expected not in {None, digest}
            or told not in {None, len(ingest.data)}
        ):
            with pytest.raises((DigestMismatch, Refused)):
                ingest.writer.commit(labels, size=told)
            self.drop(key)
            event("a commit that is refused")
            return
        event(f"a commit of an ingest that expects {'it' if ingest.expected else 'nothing'}")
        if fault:
            with (
                armed(f"content.commit.{fault}", "error"),
                pytest.raises(EngineError, match="failpoint"),
            ):
                ingest.writer.commit(labels)
        else:
            assert ingest.writer.commit(labels, size=told).digest == digest
        with pytest.raises(FailedPrecondition, match="closed"):
            ingest.writer.write(b"")
        if fault == "before":
            if ingest.durable or len(ingest.data) > INLINE:
                ingest.durable = len(ingest.data)
            self.lost(key)
            return
        self.drop(key)
        blobs = self.blobs[key[0]]
        _, before = blobs.get(digest, (b"", {}))
        blobs[digest] = (ingest.data, {**before, **labels})

    def lost(self, key):
        """Leave of an ingest what is durable."""
        ingest = self.ingests[key]
        ingest.writer = None
        ingest.data = ingest.data[: ingest.durable]
        if not ingest.recorded:
            self.drop(key)

    @rule(space=st.sampled_from(SPACES), sizes=st.lists(SIZES, min_size=1, max_size=3), fill=FILLS)
    def put(self, space, sizes, fill):
        """Bring in a whole blob: most of the time there should be some."""
        data = fill * sum(sizes)
        digest = digest_of(data)
        try:
            writer = self.content(space).ingest("put", lease="", expected=digest, total=len(data))
        except AlreadyExists:
            assert digest in self.blobs[space]
            return
        with writer:
            for size in sizes if not writer.offset else ():
                writer.write(fill * size)
            writer.commit()
        self.blobs[space][digest] = (data, {})

    @precondition(writing)
    @rule(data=st.data(), abort=st.booleans())
    def end(self, data, abort):
        key = data.draw(st.sampled_from(self.writing()))
        ingest = self.ingests[key]
        if abort:
            ingest.writer.abort()
            self.drop(key)
            return
        ingest.writer.close()
        ingest.writer = None
        if ingest.shared or not (ingest.recorded or ingest.data):
            self.drop(key)
        else:
            ingest.recorded, ingest.durable = True, len(ingest.data)

    @rule(space=st.sampled_from(SPACES), ref=REFS)
    def abort_by_reference(self, space, ref):
        if (space, ref) in self.writing():
            return
        try:
            self.content(space).abort(ref)
        except NotFound:
            assert (space, ref) not in self.ingests
        else:
            self.drop((space, ref))

    # -- blobs ----------------------------------------------------------------------------

    @precondition(stored)
    @rule(data=st.data(), labels=LABELS, merge=st.booleans())
    def update(self, data, labels, merge):
        space, digest = data.draw(st.sampled_from(self.stored()))
        content, before = self.blobs[space][digest]
        after = {key: value for key, value in {**before, **labels}.items() if value}
        if merge:
            updated = self.content(space).update(digest, labels)
        else:
            paths = [f"labels.{key}" for key in labels] or ["labels.none"]
            updated = self.content(space).update_fields(digest, labels, paths)
        assert updated.labels == after
        self.blobs[space][digest] = (content, after)

    @precondition(stored)
    @rule(data=st.data())
    def delete(self, data):
        space, digest = data.draw(st.sampled_from(self.stored()))
        self.content(space).delete(digest)
        del self.blobs[space][digest]

    @precondition(stored)
    @rule(data=st.data())
    def open_reader(self, data):
        space, digest = data.draw(st.sampled_from(self.stored()))
        self.readers.append((self.content(space).open(digest), self.blobs[space][digest][0]))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), close=st.booleans())
    def read(self, data, close):
        """Whatever happened to the blob since it was opened."""
        at = data.draw(st.integers(0, len(self.readers) - 1))
        reader, whole = self.readers[at]
        offset = data.draw(st.sampled_from([0, 1, EXTENT - 1, EXTENT, len(whole)]))
        assert reader.read_at(offset, EXTENT) == whole[offset : offset + EXTENT]
        with reader.view(0, 5) as view:
            assert bytes(view) == whole[:5]
        if close:
            reader.close()
            del self.readers[at]

    @rule()
    def cleanup(self):
        self.content("default").cleanup()
        self.bytes_are_as_in_the_model()
        with self.root.meta.read() as txn:
            blobs, ingests, trash = (table.scan(txn) for table in (BLOBS, INGESTS, TRASH))
            small = SMALL.count(txn)
        borrowed = any(self.ingests[key].shared for key in self.writing())
        assert not trash or self.readers or borrowed
        sizes = {blob.number: blob.size for blob in blobs}
        numbers = {number for number, _ in extents(self.stores)}
        assert numbers <= sizes.keys() | {record.number for record in (*trash, *ingests)}
        apart = {number for number, size in sizes.items() if size and number not in numbers}
        assert all(sizes[number] <= INLINE for number in apart)
        assert len(apart) <= small <= len(sizes)

    @rule(space=st.sampled_from(SPACES), expired=st.booleans())
    def collect(self, space, expired):
        """Nothing has a name: what an ingest may become stays, and an ingest until its time is over."""
        idle = [key for key in self.ingests if key[0] == space and not self.ingests[key].writer]
        if expired:
            with self.root.meta.write() as txn:
                for record in INGESTS.scan(txn, space):
                    if (space, record.ref) in idle:
                        ledger.put(txn, space, msgspec.structs.replace(record, expires=1))
            for key in idle:
                self.drop(key)
        self.spaces[space].collect()
        kept = {i.expected for key, i in self.ingests.items() if key[0] == space and i.recorded}
        blobs = self.blobs[space]
        self.blobs[space] = {digest: blobs[digest] for digest in blobs if digest in kept}

    @rule()
    def reopen(self):
        self.crash()
        self.root.close()
        self.open()
        self.bytes_are_as_in_the_model()

    def crash(self):
        """Let go of everything but what the kernel would have let go of by itself."""
        for key in self.writing():
            self.ingests[key].writer._let_go()
            self.lost(key)
        for reader, _ in self.readers:
            reader.close()
        self.readers.clear()

    # -- what always holds ----------------------------------------------------------------

    @invariant()
    def blobs_are_as_in_the_model(self):
        for space in SPACES:
            found = {blob.digest: (blob.size, blob.labels) for blob in self.content(space).walk()}
            model = self.blobs[space].items()
            assert found == {digest: (len(data), labels) for digest, (data, labels) in model}

    def bytes_are_as_in_the_model(self):
        """Hash all; when something was deleted or opened again, as each time takes long."""
        for space, digest in self.stored():
            data = self.blobs[space][digest][0]
            assert self.content(space).read_all(digest, len(data)) == data

    @invariant()
    def ingests_are_as_in_the_model(self):
        for space in SPACES:
            found = {status.ref: status.offset for status in self.content(space).statuses()}
            here = {key[1]: i for key, i in self.ingests.items() if key[0] == space and i.recorded}
            assert found == {ref: ingest.durable for ref, ingest in here.items()}


TestP7P8Content = ContentMachine.TestCase
TestP7P8Content.settings = settings(settings.default, max_examples=60, stateful_step_count=30)
