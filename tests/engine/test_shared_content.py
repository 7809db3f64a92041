"""Namespaces: what they see of each other, and bytes that several have (containerd's suites of
namespaces: append, share, isolate, and shared by a label)."""

import hashlib

import pytest

from engine.content import discard
from engine.errors import DigestMismatch, NotFound, Refused
from engine.kv import keys
from engine.kv.schema import BLOBS, EXTENT, NAMESPACES, Namespace, now
from engine.metadata.leases import leased
from engine.oci.digest import Digest, digest_of
from engine.stores import Stores
from tests.engine.image_files import extents, records
from tests.engine.test_content import leased_items, pattern, put

SIZES = [0, 100, 2 * EXTENT + 5]


@pytest.fixture
def other(stores):
    return Stores(stores.root, "other", stores.platform)


def say(stores, namespace, *, isolated=False, shareable=False):
    labels = {"containerd.io/namespace.shareable": "true"} if shareable else {}
    record = Namespace(name=namespace, created=now(), updated=now(), isolated=isolated, labels=labels)
    with stores.root.meta.write() as txn:
        NAMESPACES.put(txn, record, namespace)


def share(content, digest, **options):
    with content.ingest("x", lease=options.pop("lease", ""), expected=digest, **options) as writer:
        assert writer.digest == digest
        return writer.commit(options.get("labels"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("known", [True, False])
def test_suite_cross_namespace_share(stores, other, size, known):
    data = pattern(size)
    blob = put(stores.content, data, labels={"mine": "1"})
    assert not list(other.content.walk())
    with pytest.raises(NotFound):
        other.content.info(blob.digest)
    before = extents(stores)
    writer = other.content.ingest("x", lease="", expected=blob.digest, total=size if known else None)
    assert (writer.offset, writer.digest) == (size, blob.digest)
    assert not other.content.statuses()
    shared = writer.commit({"theirs": "2"}, size=size, expected=blob.digest)
    assert (shared.number, shared.size, shared.labels) == (blob.number, size, {"theirs": "2"})
    assert stores.content.info(blob.digest).labels == {"mine": "1"}
    assert extents(stores) == before
    assert other.content.verify(blob.digest) == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [0, 1])
def test_gc_12_bytes_stay_as_long_as_a_namespace_has_them(stores, other, size, first):
    data = pattern(size)
    digest = put(stores.content, data).digest
    share(other.content, digest)
    places = [stores, other]
    one, two = places[first], places[1 - first]
    one.content.delete(digest)
    one.collect()
    one.content.cleanup()
    with pytest.raises(NotFound):
        one.content.open(digest)
    assert two.content.read_all(digest, size) == data
    two.collect()
    two.content.cleanup()
    assert not extents(stores)
    assert not any(records(stores).values())


@pytest.mark.parametrize("size", SIZES)
def test_gc_16_bytes_stay_while_another_record_of_the_blob_cannot_be_read(stores, other, size):
    digest = put(stores.content, pattern(size)).digest
    share(other.content, digest)
    before = extents(stores)
    with stores.root.meta.write() as txn:
        sound = BLOBS.get(txn, "default", digest)
        txn.raw.put(keys.encode(["default", digest]), b"\xff", db=txn.databases[BLOBS.name])
    other.content.delete(digest)
    other.content.cleanup()
    assert extents(stores) == before
    with stores.root.meta.write() as txn:
        BLOBS.put(txn, sound, "default", digest)
    assert stores.content.read_all(digest, size) == pattern(size)


@pytest.mark.parametrize("size", SIZES)
def test_what_the_giver_drops_meanwhile_is_shared_all_the_same(stores, other, size):
    """Nobody deletes the bytes as long as the writer is open, and then they have a record again."""
    data = pattern(size)
    digest = put(stores.content, data).digest
    writer = other.content.ingest("x", lease="", expected=digest, total=size)
    stores.content.delete(digest)
    stores.content.cleanup()
    blob = writer.commit()
    stores.content.cleanup()
    assert other.content.read_all(digest, size) == data
    assert not records(stores)["trash"]
    assert {number for number, _ in extents(stores)} == ({blob.number} if size > EXTENT else set())


def test_gc_10_a_deletion_that_looked_before_leaves_what_is_taken_back(stores, other, monkeypatch):
    """Dropped, listed, shared and let go, before the deletion asks who holds it."""
    data = pattern(EXTENT)
    digest = put(stores.content, data).digest
    writer = other.content.ingest("x", lease="", expected=digest)
    stores.content.delete(digest)
    free = discard.Holds.free

    def sharing(self, numbers):
        monkeypatch.setattr(discard.Holds, "free", free)
        writer.commit()
        return free(self, numbers)

    monkeypatch.setattr(discard.Holds, "free", sharing)
    stores.content.cleanup()
    assert other.content.read_all(digest, EXTENT) == data


@pytest.mark.parametrize("size", SIZES)
def test_suite_cross_namespace_append(stores, other, size):
    """The first byte that is written makes the bytes one's own: a copy, and what comes after."""
    data = pattern(size)
    blob = put(stores.content, data)
    with other.content.ingest("x", lease="", expected=blob.digest) as writer:
        writer.write(b"")
        assert not records(stores)["ingests"]
        writer.write(b"more")
        assert writer.offset == size + 4
        assert writer.digest == digest_of(data + b"more")
        with pytest.raises(DigestMismatch):
            writer.commit()
    assert not list(other.content.walk())
    writer = other.content.ingest("x", lease="", expected=blob.digest, total=size)
    with pytest.raises(Refused, match="longer"):
        writer.write(b"more")
    assert stores.content.verify(blob.digest) == size
    other.content.cleanup()
    assert {number for number, _ in extents(stores)} <= {blob.number}


@pytest.mark.parametrize("size", SIZES)
def test_truncated_to_bytes_of_ones_own(stores, other, size):
    data = pattern(size)
    blob = put(stores.content, data)
    with other.content.ingest("x", lease="", expected=blob.digest, total=size) as writer:
        writer.truncate()
        assert (writer.offset, writer.digest) == (0, digest_of(b""))
        writer.write(data)
        own = writer.commit()
    assert own.number != blob.number
    assert other.content.read_all(own.digest, size) == data
    stores.content.delete(blob.digest)
    stores.content.cleanup()
    assert other.content.verify(own.digest) == size


def test_a_shared_ingest_that_is_closed_leaves_nothing(stores, other):
    digest = put(stores.content, pattern(EXTENT)).digest
    before = records(stores)
    other.content.ingest("x", lease="", expected=digest).close()
    other.content.ingest("x", lease="", expected=digest).abort()
    assert records(stores) == before


def test_another_size_or_digest_of_a_shared_blob(stores, other):
    data = pattern(EXTENT)
    digest = put(stores.content, data).digest
    with other.content.ingest("x", lease="", expected=digest, total=EXTENT + 1) as writer:
        assert writer.offset == 0
        writer.abort()
    with other.content.ingest("x", lease="", expected=digest) as writer, pytest.raises(Refused):
        writer.commit(size=5)
    with other.content.ingest("x", lease="", expected=digest) as writer, pytest.raises(DigestMismatch):
        writer.commit(expected=digest_of(b"other"))
    sha512 = Digest("sha512:" + hashlib.sha512(data).hexdigest())
    with other.content.ingest("x", lease="", expected=digest) as writer:
        assert writer.commit(expected=sha512).digest == sha512
    assert other.content.verify(sha512) == EXTENT


def test_gc_05_what_is_shared_joins_the_lease(stores, other):
    digest = put(stores.content, b"data").digest
    with leased(stores.root.meta, "other") as lease:
        share(other.content, digest, lease=lease)
        other.collect()
        assert other.content.info(digest)
    with stores.root.meta.read() as txn:
        assert BLOBS.get(txn, "default", digest)
    assert leased_items(stores, lease) == set()
    other.collect()
    assert not list(other.content.walk())
    assert stores.content.verify(digest) == 4


@pytest.mark.parametrize("isolated", ["default", "other"])
def test_suite_cross_namespace_isolate(stores, other, isolated):
    """An isolated namespace neither sees nor gives: the bytes have to be brought (GC-12)."""
    data = pattern(EXTENT)
    blob = put(stores.content, data)
    say(stores, isolated, isolated=True)
    with other.content.ingest("x", lease="", expected=blob.digest, total=EXTENT) as writer:
        assert (writer.offset, writer.digest) == (0, digest_of(b""))
        writer.write(data)
        own = writer.commit()
    assert own.number != blob.number
    stores.content.delete(blob.digest)
    stores.content.cleanup()
    assert other.content.verify(own.digest) == EXTENT


@pytest.mark.parametrize("isolated", [(), ("default",), ("other",), ("default", "other")])
def test_suite_shared_namespace_isolate(stores, other, isolated):
    """What is labelled shareable is given to all."""
    blob = put(stores.content, pattern(EXTENT))
    for namespace in {"default", *isolated}:
        say(stores, namespace, isolated=namespace in isolated, shareable=namespace == "default")
    assert share(other.content, blob.digest).number == blob.number
    # It is not given on by one that is not labelled.
    third = Stores(stores.root, "third", stores.platform)
    say(stores, "third", isolated=True)
    stores.content.delete(blob.digest)
    with third.content.ingest("x", lease="", expected=blob.digest) as writer:
        assert writer.offset == 0
        writer.abort()


def test_a_third_namespace_shares_of_any(stores, other):
    digest = put(stores.content, pattern(EXTENT)).digest
    share(other.content, digest)
    stores.content.delete(digest)
    third = Stores(stores.root, "third", stores.platform)
    share(third.content, digest)
    other.content.delete(digest)
    other.content.cleanup()
    assert third.content.verify(digest) == EXTENT
