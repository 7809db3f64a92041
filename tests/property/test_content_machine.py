"""The content store against a dictionary: any order of calls, with the root closed in between."""

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import AlreadyExists, DigestMismatch, EngineError, NotFound, Refused, Unavailable
from engine.failpoints import armed
from engine.kv.schema import EXTENT
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
from tests.engine.image_files import extents, records
from tests.filesystems import shared_memory

REFS = st.sampled_from(["a", "b", "b" * 300])
SIZES = st.sampled_from([0, 1, 7, EXTENT - 1, EXTENT, EXTENT + 1])
FILLS = st.sampled_from([b"x", b"y"])
LABELS = st.dictionaries(st.sampled_from(["k", "l"]), st.sampled_from(["", "1", "2"]))


class _Ingest:
    """What the model knows of an ingest: all bytes given to it, and the writer if one is open."""

    def __init__(self, expected, total, fill, writer):
        self.expected, self.total, self.fill, self.writer = expected, total, fill, writer
        self.data = b""

    def stop(self):
        self.writer = None
        self.data = self.data[: len(self.data) // EXTENT * EXTENT]


class ContentMachine(RuleBasedStateMachine):
    """Blobs by digest and ingests by reference; only whole extents of an ingest are durable."""

    def __init__(self):
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.blobs: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.ingests: dict[str, _Ingest] = {}
        self.open()

    def open(self):
        self.root = Root(self.folder / "root")
        self.stores = Stores(self.root, "default", Platform())
        self.content = self.stores.content

    def teardown(self):
        self.bytes_are_as_in_the_model()
        self.root.close()
        self.memory.__exit__(None, None, None)

    def writing(self):
        return [ref for ref, ingest in self.ingests.items() if ingest.writer]

    # -- ingests --------------------------------------------------------------------------

    @rule(ref=REFS, size=st.none() | SIZES, fill=st.none() | FILLS)
    def begin(self, ref, size, fill):
        expected = digest_of((fill or b"") * (size or 0)) if fill else None
        old = self.ingests.get(ref)
        try:
            writer = self.content.ingest(ref, lease="", expected=expected, total=size)
        except Unavailable:
            assert old is not None
            assert old.writer is not None
            return
        except AlreadyExists:
            assert expected in self.blobs
            return
        assert old is None or old.writer is None
        assert expected not in self.blobs
        ingest = _Ingest(expected, size, fill, writer)
        if old and (old.expected, old.total) == (expected, size):
            ingest.data = old.data
            event(f"goes on with {'something' if old.data else 'nothing'}")
        self.ingests[ref] = ingest
        assert writer.offset == len(ingest.data)
        assert writer.digest == digest_of(ingest.data)

    @precondition(writing)
    @rule(data=st.data(), size=SIZES, fill=FILLS)
    def write(self, data, size, fill):
        ref = data.draw(st.sampled_from(self.writing()))
        ingest = self.ingests[ref]
        rest = max(0, (ingest.total or 0) - len(ingest.data))
        if rest and data.draw(st.integers(0, 3)):  # most announcements come true
            size, fill = rest, ingest.fill or fill
        fits = ingest.total is None or len(ingest.data) + size <= ingest.total
        try:
            ingest.writer.write(fill * size)
        except Refused:
            assert not fits
            del self.ingests[ref]
            return
        assert fits
        ingest.data += fill * size
        event("wrote to an announced size" if len(ingest.data) == ingest.total else "wrote")
        assert ingest.writer.offset == len(ingest.data)

    @precondition(writing)
    @rule(data=st.data(), labels=LABELS, fault=st.sampled_from(["", "", "before", "after"]))
    def commit(self, data, labels, fault):
        ref = data.draw(st.sampled_from(self.writing()))
        labels = {key: value for key, value in labels.items() if value}
        ingest = self.ingests[ref]
        digest = digest_of(ingest.data)
        if ingest.total not in {None, len(ingest.data)} or ingest.expected not in {None, digest}:
            with pytest.raises((DigestMismatch, Refused)):
                ingest.writer.commit(labels)
            del self.ingests[ref]
            event("a commit that is refused")
            return
        event(f"a commit of an ingest that expects {'it' if ingest.expected else 'nothing'}")
        if fault:
            self.commit_with_fault(ingest.writer, labels, fault)
        else:
            assert ingest.writer.commit(labels).digest == digest
        if fault == "before":
            ingest.stop()
            return
        del self.ingests[ref]
        _, before = self.blobs.get(digest, (b"", {}))
        self.blobs[digest] = (ingest.data, {**before, **labels})

    def commit_with_fault(self, writer, labels, fault):
        point = f"content.commit.{fault}"
        with writer, armed(point, "error"), pytest.raises(EngineError, match="failpoint"):
            writer.commit(labels)

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=3), fill=FILLS)
    def put(self, sizes, fill):
        """Bring in a whole blob: most of the time there should be some."""
        data = fill * sum(sizes)
        digest = digest_of(data)
        try:
            writer = self.content.ingest("put", lease="", expected=digest, total=len(data))
        except AlreadyExists:
            assert digest in self.blobs
            return
        with writer:
            for size in sizes:
                writer.write(fill * size)
            writer.commit()
        self.blobs[digest] = (data, {})

    @precondition(writing)
    @rule(data=st.data(), abort=st.booleans())
    def end(self, data, abort):
        ref = data.draw(st.sampled_from(self.writing()))
        if abort:
            self.ingests.pop(ref).writer.abort()
        else:
            self.ingests[ref].writer.close()
            self.ingests[ref].stop()

    @rule(ref=REFS)
    def abort_by_reference(self, ref):
        if ref in self.writing():
            return
        try:
            self.content.abort(ref)
        except NotFound:
            assert ref not in self.ingests
        else:
            del self.ingests[ref]

    # -- blobs ----------------------------------------------------------------------------

    @precondition(lambda self: self.blobs)
    @rule(data=st.data(), labels=LABELS)
    def update(self, data, labels):
        digest = data.draw(st.sampled_from(sorted(self.blobs)))
        content, before = self.blobs[digest]
        after = {key: value for key, value in {**before, **labels}.items() if value}
        assert self.content.update(digest, labels).labels == after
        self.blobs[digest] = (content, after)

    @precondition(lambda self: self.blobs)
    @rule(data=st.data())
    def delete(self, data):
        digest = data.draw(st.sampled_from(sorted(self.blobs)))
        self.content.delete(digest)
        del self.blobs[digest]

    @rule()
    def cleanup(self):
        self.content.cleanup()
        self.bytes_are_as_in_the_model()
        assert not records(self.stores)["trash"]
        owned = -sum(-len(data) // EXTENT for data, _ in self.blobs.values())
        # A commit that failed has stored the last extent, short as it is.
        begun = sum(len(ingest.data) // EXTENT + 1 for ingest in self.ingests.values())
        stored = len(extents(self.stores))
        assert owned <= stored <= owned + begun

    @rule()
    def reopen(self):
        for ref in self.writing():
            self.ingests[ref].stop()
        self.root.close()
        self.open()
        self.bytes_are_as_in_the_model()

    # -- what always holds ----------------------------------------------------------------

    @invariant()
    def blobs_are_as_in_the_model(self):
        found = {blob.digest: (blob.size, blob.labels) for blob in self.content.walk()}
        assert found == {digest: (len(data), labels) for digest, (data, labels) in self.blobs.items()}

    def bytes_are_as_in_the_model(self):
        """Hash all; when something was deleted or opened again, as each time takes long."""
        for digest, (data, _) in self.blobs.items():
            assert self.content.read_all(digest, len(data)) == data

    @invariant()
    def ingests_are_as_in_the_model(self):
        found = {status.ref: status.offset for status in self.content.statuses()}
        assert found.keys() == self.ingests.keys()
        for ref, ingest in self.ingests.items():
            assert len(ingest.data) // EXTENT * EXTENT <= found[ref] <= len(ingest.data) + EXTENT


TestContent = ContentMachine.TestCase
TestContent.settings = settings(settings.default, max_examples=100, stateful_step_count=30)
