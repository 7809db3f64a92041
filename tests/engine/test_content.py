"""The content store: ingests, commits, pins, labels, deletion and verification, one rule each."""

import hashlib
import subprocess
import sys

import pytest

from engine.content import discard
from engine.errors import (
    AlreadyExists,
    DataLoss,
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Refused,
    Unavailable,
)
from engine.failpoints import armed
from engine.kv.schema import EXTENT, LEASE_ITEMS
from engine.metadata.leases import leased
from engine.oci.digest import Digest, digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
from tests.engine.image_files import extents as stored_extents
from tests.engine.image_files import records

SIZES = [0, 1, EXTENT - 1, EXTENT, EXTENT + 1, 2 * EXTENT, 9 * EXTENT + 7]


def pattern(size: int, seed: bytes = b"") -> bytes:
    """Return bytes that differ from extent to extent, so that a mix-up shows."""
    block = hashlib.sha256(seed).digest() * 1024
    pieces = [index.to_bytes(8, "big") + block for index in range(size // len(block) + 1)]
    return b"".join(pieces)[:size]


def put(content, data: bytes, *, lease: str = "", labels=None, **expect):
    with content.ingest(f"put {digest_of(data)}", lease=lease, **expect) as writer:
        writer.write(data)
        return writer.commit(labels)


def leased_items(stores, lease):
    with stores.root.meta.read() as txn:
        return {item.key for item in LEASE_ITEMS.scan(txn, "default", lease)}


# -- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_bytes_come_back(stores, size):
    data = pattern(size)
    blob = put(stores.content, data)
    assert (blob.digest, blob.size) == (digest_of(data), size)
    assert b"".join(bytes(piece) for piece in stores.content.read(blob.digest)) == data
    assert stores.content.read_all(blob.digest, size) == data
    assert stores.content.verify(blob.digest) == size


@pytest.mark.parametrize("size", SIZES[2:])
@pytest.mark.parametrize("step", [1 << 16, EXTENT - 1, EXTENT, EXTENT + 1, 3 * EXTENT])
def test_pieces_of_any_size_make_the_same_blob(stores, size, step):
    data = pattern(size)
    with stores.content.ingest("x", lease="") as writer:
        for start in range(0, size, step):
            writer.write(memoryview(data)[start : start + step])
            assert writer.offset == min(size, start + step)
        assert writer.digest == digest_of(data)
        blob = writer.commit()
    lengths = [len(piece) for piece in stores.content.read(blob.digest)]
    assert lengths == [EXTENT] * (size // EXTENT) + ([size % EXTENT] if size % EXTENT else [])


def test_a_writer_does_not_keep_the_callers_buffer(stores):
    buffer = bytearray(b"before")
    with stores.content.ingest("x", lease="") as writer:
        writer.write(buffer)
        buffer[:] = b"after!"
        assert writer.commit().digest == digest_of(b"before")


def test_sha512(stores):
    digest = Digest("sha512:" + hashlib.sha512(b"x").hexdigest())
    assert put(stores.content, b"x", expected=digest).digest == digest
    assert stores.content.verify(digest) == 1
    assert put(stores.content, b"x").digest == digest_of(b"x")
    assert len(list(stores.content.walk())) == 2


def test_read_all_is_bounded(stores):
    blob = put(stores.content, b"12345")
    with pytest.raises(Refused, match="over 4 bytes"):
        stores.content.read_all(blob.digest, 4)


@pytest.mark.parametrize("method", ["info", "read", "verify", "delete"])
def test_an_absent_blob(stores, method):
    with pytest.raises(NotFound):
        getattr(stores.content, method)(digest_of(b"absent"))


# -- ingests ----------------------------------------------------------------------------------


def test_an_ingest_is_not_a_blob(stores):
    data = pattern(EXTENT)
    with stores.content.ingest("x", lease="", expected=digest_of(data), total=EXTENT) as writer:
        writer.write(data)
        assert not list(stores.content.walk())
        with pytest.raises(NotFound):
            stores.content.info(digest_of(data))
        (status,) = stores.content.statuses()
        assert (status.ref, status.total, status.expected) == ("x", EXTENT, digest_of(data))
        writer.commit()
    assert not stores.content.statuses()


def test_status_tells_what_is_durable(stores):
    with stores.content.ingest("x", lease="") as writer:
        writer.write(pattern(2 * EXTENT + 5))
        assert writer.offset == 2 * EXTENT + 5
        assert [status.offset for status in stores.content.statuses()] == [2 * EXTENT]


def test_an_ingest_goes_on_where_it_stopped(stores):
    data = pattern(3 * EXTENT + 5)
    with stores.content.ingest("x", lease="", total=len(data)) as writer:
        writer.write(data[: 2 * EXTENT + 9])
    with stores.content.ingest("x", lease="", total=len(data)) as writer:
        assert writer.offset == 2 * EXTENT + 9
        assert writer.digest == digest_of(data[: 2 * EXTENT + 9])
        writer.write(data[2 * EXTENT + 9 :])
        assert writer.commit().digest == digest_of(data)
    assert stores.content.verify(digest_of(data)) == len(data)


@pytest.mark.parametrize("size", [EXTENT - 5, EXTENT + 3, 2 * EXTENT])
def test_a_fault_at_commit_is_resumed(stores, size):
    """The last extent is stored by then; it must not be counted twice or left behind."""
    data = pattern(size)
    with stores.content.ingest("x", lease="", total=size) as writer:
        writer.write(data)
        with armed("content.commit.before", "error"), pytest.raises(EngineError, match="failpoint"):
            writer.commit()
    with stores.content.ingest("x", lease="", total=size) as writer:
        writer.write(data[writer.offset :])
        assert writer.commit().digest == digest_of(data)
    assert stores.content.verify(digest_of(data)) == size
    assert len(stored_extents(stores)) == -(-size // EXTENT)


@pytest.mark.parametrize(
    "other",
    [
        {"total": 7 + EXTENT},
        {"total": 6, "expected": digest_of(b"other")},
        {"expected": digest_of(b"other")},
        {"expected": Digest("sha512:" + hashlib.sha512(b"data").hexdigest())},
    ],
)
def test_other_expectations_begin_anew(stores, other):
    data = pattern(EXTENT)
    known = {"total": 6 + EXTENT, "expected": digest_of(b"data")}
    with stores.content.ingest("x", lease="", **known) as writer:
        writer.write(data)
    with stores.content.ingest("x", lease="", **other) as writer:
        assert writer.offset == 0
        writer.abort()
    stores.content.cleanup()
    assert not stored_extents(stores)


def test_one_writer_at_a_time(stores):
    with stores.content.ingest("x", lease="") as writer:
        with pytest.raises(Unavailable):
            stores.content.ingest("x", lease="")
        writer.write(b"data")
        writer.commit()
    stores.content.ingest("x", lease="").close()


def test_a_fault_at_the_beginning_lets_the_next_one_in(stores):
    with armed("content.ingest.begun", "error"), pytest.raises(EngineError, match="failpoint"):
        stores.content.ingest("x", lease="")
    stores.content.ingest("x", lease="").close()


_CHILD = """
import os, sys
from pathlib import Path
from engine.kv.schema import EXTENT
from engine.metadata.leases import leased
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
root = Root(Path(sys.argv[1]))
content = Stores(root, "default", Platform(os="linux", architecture="amd64")).content
writer = content.ingest("x", lease="", total=2 * EXTENT)
writer.write(bytes(EXTENT + 5))
print("ready", flush=True)
sys.stdin.readline()
os._exit(0)
"""


def test_a_writer_in_another_process(stores):
    """While it lives the ingest is its own; when it died, the next one goes on."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(stores.root.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    try:
        with pytest.raises(Unavailable, match=str(child.pid)):
            stores.content.ingest("x", lease="", total=2 * EXTENT)
    finally:
        child.communicate("go\n")
    with stores.content.ingest("x", lease="", total=2 * EXTENT) as writer:
        assert writer.offset == EXTENT
        writer.write(bytes(EXTENT))
        assert writer.commit().digest == digest_of(bytes(2 * EXTENT))


@pytest.mark.parametrize("written", [0, 3, 5])
def test_m_04_a_blob_of_another_size(stores, written):
    writer = stores.content.ingest("x", lease="", total=4)
    with writer, pytest.raises(Refused):  # noqa: PT012  either of the two may be the one
        writer.write(bytes(written))
        writer.commit()
    stores.content.cleanup()
    assert not any(records(stores).values())


def test_m_04_writing_stops_at_the_announced_size(stores):
    writer = stores.content.ingest("x", lease="", total=EXTENT)
    with pytest.raises(Refused, match="longer"):
        writer.write(pattern(4 * EXTENT))
    assert not stored_extents(stores)
    with pytest.raises(FailedPrecondition):
        writer.write(b"more")


def test_m_05_other_bytes(stores):
    writer = stores.content.ingest("x", lease="", expected=digest_of(b"good"), total=4)
    writer.write(b"evil")
    with pytest.raises(DigestMismatch):
        writer.commit()
    stores.content.cleanup()
    assert not any(records(stores).values())
    # A bad download is not resumed for ever: the next attempt begins at nothing.
    with stores.content.ingest("x", lease="", expected=digest_of(b"good"), total=4) as writer:
        assert writer.offset == 0


def test_abort_by_reference(stores):
    with stores.content.ingest("x", lease="") as writer:
        writer.write(pattern(EXTENT + 1))
    stores.content.abort("x")
    stores.content.cleanup()
    assert not any(records(stores).values())
    assert not stored_extents(stores)
    with pytest.raises(NotFound):
        stores.content.abort("x")


def test_no_blob_comes_of_an_aborted_ingest(stores):
    """Its bytes may be gone by then: the record would name nothing (GC-09)."""
    writer = stores.content.ingest("x", lease="")
    writer.write(pattern(EXTENT))
    stores.content.abort("x")
    stores.content.cleanup()
    writer.write(pattern(EXTENT))
    with pytest.raises(FailedPrecondition):
        writer.commit()
    stores.content.cleanup()
    assert not any(records(stores).values())
    assert not stored_extents(stores)
    stores.content.ingest("x", lease="").close()


def test_a_writer_does_not_abort_anothers_ingest(stores):
    """After an abort by reference, another process may have begun the same one anew."""
    other = Stores(stores.root, "default", Platform())
    writer = stores.content.ingest("x", lease="")
    stores.content.abort("x")
    stores.root.owners.release("default", "x")  # which another process never claimed
    later = other.content.ingest("x", lease="")
    writer.abort()
    later.write(b"data")
    assert later.commit().digest == digest_of(b"data")


def test_a_closed_writer(stores):
    writer = stores.content.ingest("x", lease="")
    writer.close()
    writer.close()
    for call in (lambda: writer.write(b"x"), writer.commit):
        with pytest.raises(FailedPrecondition):
            call()


# -- what exists already ----------------------------------------------------------------------


def test_gc_11_found_is_pinned(stores):
    blob = put(stores.content, b"data")
    with leased(stores.root.meta, "default") as lease:
        with pytest.raises(AlreadyExists):
            stores.content.ingest("x", lease=lease, expected=blob.digest)
        assert leased_items(stores, lease) == {blob.digest}
        assert not stores.content.statuses()
        stores.collect()
        assert stores.content.info(blob.digest)


def test_gc_05_made_and_looked_up_are_pinned(stores):
    other = put(stores.content, b"other")
    with leased(stores.root.meta, "default") as lease:
        blob = put(stores.content, b"data", lease=lease)
        stores.content.info(other.digest, lease=lease)
        assert leased_items(stores, lease) == {blob.digest, other.digest}


def test_nothing_is_pinned_by_a_lease_that_ended(stores):
    blob = put(stores.content, b"data")
    with leased(stores.root.meta, "default") as lease:
        writer = stores.content.ingest("x", lease=lease)
    with pytest.raises(FailedPrecondition):
        stores.content.info(blob.digest, lease=lease)
    with pytest.raises(FailedPrecondition):
        stores.content.ingest("y", lease=lease, expected=blob.digest)
    writer.write(b"more")
    with pytest.raises(FailedPrecondition):
        writer.commit()
    writer.abort()
    assert [found.digest for found in stores.content.walk()] == [blob.digest]


def test_the_same_bytes_twice(stores):
    """Two who did not know of each other: one blob, the labels of both, no bytes twice."""
    first, second = (stores.content.ingest(ref, lease="") for ref in "ab")
    for writer in (first, second):
        writer.write(pattern(EXTENT + 1))
    one = first.commit({"a": "1", "both": "1"})
    two = second.commit({"b": "2", "both": "2"})
    assert one.number == two.number
    assert stores.content.info(one.digest).labels == {"a": "1", "b": "2", "both": "2"}
    stores.content.cleanup()
    assert len(stored_extents(stores)) == 2
    assert stores.content.verify(one.digest) == EXTENT + 1


# -- labels, deletion, namespaces -------------------------------------------------------------


def test_labels(stores):
    blob = put(stores.content, b"data", labels={"a": "1", "b": "2"})
    updated = stores.content.update(blob.digest, {"a": "", "c": "3"})
    assert updated.labels == {"b": "2", "c": "3"}
    assert updated.created == blob.created
    assert updated.updated >= blob.updated
    assert stores.content.info(blob.digest) == updated
    with pytest.raises(NotFound):
        stores.content.update(digest_of(b"absent"), {"a": "1"})


def test_labels_have_limits(stores):
    blob = put(stores.content, b"data")
    with pytest.raises(InvalidArgument):
        stores.content.update(blob.digest, {"k": "v" * 5000})
    with pytest.raises(InvalidArgument):
        put(stores.content, b"other", labels={"k": "v" * 5000})
    assert [found.digest for found in stores.content.walk()] == [blob.digest]


def test_deleted_now_and_freed_later(stores):
    blob = put(stores.content, pattern(3 * EXTENT))
    kept = put(stores.content, pattern(EXTENT, b"kept"))
    stores.content.delete(blob.digest)
    assert [found.digest for found in stores.content.walk()] == [kept.digest]
    assert len(stored_extents(stores)) == 4
    stores.content.cleanup()
    assert {number for number, _ in stored_extents(stores)} == {kept.number}
    assert stores.content.verify(kept.digest)


def test_gc_10_brought_back_between_the_phases(stores):
    """A number is never used twice, so a late deletion cannot meet the new bytes."""
    data = pattern(2 * EXTENT)
    old = put(stores.content, data)
    stores.content.delete(old.digest)
    new = put(stores.content, data)
    assert new.number > old.number
    stores.content.cleanup()
    assert stores.content.verify(new.digest) == len(data)
    assert {number for number, _ in stored_extents(stores)} == {new.number}


def test_a_deletion_of_many_extents(stores):
    """More than one transaction deletes."""
    blob = put(stores.content, pattern(130 * EXTENT))
    put(stores.content, pattern(EXTENT, b"next"))
    stores.content.delete(blob.digest)
    stores.content.cleanup()
    assert len(stored_extents(stores)) == 1


def test_gc_09_a_deletion_cut_short_is_finished_later(stores):
    for seed in (b"1", b"2", b"3"):
        stores.content.delete(put(stores.content, pattern(EXTENT, seed)).digest)
    with armed("trash.emptied", "error"), pytest.raises(EngineError, match="failpoint"):
        stores.content.cleanup()
    assert records(stores)["trash"]
    stores.content.cleanup()
    assert not any(records(stores).values())
    assert not stored_extents(stores)


def test_the_head_of_a_blob_is_a_few_bytes(stores):
    data = pattern(EXTENT + 10)
    blob = put(stores.content, data)
    assert stores.content.head(blob.digest, 4) == data[:4]
    assert stores.content.head(put(stores.content, b"ab").digest, 4) == b"ab"
    assert stores.content.head(put(stores.content, b"").digest, 4) == b""
    with stores.root.blobs.write() as txn:
        txn.raw.delete(extent_key(blob, 0))
    with pytest.raises(DataLoss):
        stores.content.head(blob.digest, 4)
    stores.content.delete(blob.digest)
    with pytest.raises(NotFound):
        stores.content.head(blob.digest, 4)


# -- damage -----------------------------------------------------------------------------------


def extent_key(blob, index):
    return blob.number.to_bytes(8, "big") + index.to_bytes(4, "big")


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("at", [0, -1])
def test_m_20_a_flipped_bit(stores, index, at):
    blob = put(stores.content, pattern(2 * EXTENT + 100))
    with stores.root.blobs.write() as txn:
        data = bytearray(txn.raw.get(extent_key(blob, index)))
        data[at] ^= 1
        txn.raw.put(extent_key(blob, index), bytes(data))
    with pytest.raises(DataLoss, match=blob.digest):
        stores.content.verify(blob.digest)
    with pytest.raises(DataLoss):
        stores.content.read_all(blob.digest, 1 << 30)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("change", [lambda _: None, lambda d: d[:-1], lambda d: d + b"x", lambda _: b""])
def test_m_20_a_missing_or_longer_extent(stores, index, change):
    blob = put(stores.content, pattern(2 * EXTENT + 100))
    with stores.root.blobs.write() as txn:
        data = change(bytes(txn.raw.get(extent_key(blob, index))))
        txn.raw.delete(extent_key(blob, index))
        if data is not None:
            txn.raw.put(extent_key(blob, index), data)
    for read in (stores.content.verify, lambda d: sum(map(len, stores.content.read(d)))):
        with pytest.raises(DataLoss):
            read(blob.digest)


def test_m_20_damage_to_an_unfinished_blob_shows_when_it_goes_on(stores):
    data = pattern(2 * EXTENT)
    with stores.content.ingest("x", lease="", expected=digest_of(data), total=len(data)) as writer:
        writer.write(data[:EXTENT])
    ((number, _),) = stored_extents(stores)
    with stores.root.blobs.write() as txn:
        txn.raw.put(number.to_bytes(8, "big") + bytes(4), bytes(EXTENT))
    with stores.content.ingest("x", lease="", expected=digest_of(data), total=len(data)) as writer:
        writer.write(data[EXTENT:])
        with pytest.raises(DigestMismatch):
            writer.commit()
    assert not list(stores.content.walk())


def test_a_reader_outlives_a_writer(stores):
    """Each extent has a transaction of its own: what comes later does not disturb a slow reader."""
    data = pattern(3 * EXTENT)
    blob = put(stores.content, data)
    reader = stores.content.read(blob.digest)
    parts = [bytes(next(reader))]
    put(stores.content, pattern(2 * EXTENT, b"other"))
    parts += [bytes(piece) for piece in reader]
    assert b"".join(parts) == data


def test_all_of_it_after_opening_again(tmp_path):
    data = {size: pattern(size) for size in SIZES}
    with Root(tmp_path / "root") as root:
        for value in data.values():
            put(Stores(root, "default", Platform()).content, value, labels={"size": str(len(value))})
    with Root(tmp_path / "root") as root:
        content = Stores(root, "default", Platform()).content
        for size, value in data.items():
            assert content.info(digest_of(value)).labels == {"size": str(size)}
            assert content.verify(digest_of(value)) == size


def test_bytes_are_deleted_only_of_what_is_asked_for(stores):
    both = [pattern(EXTENT, seed) for seed in (b"one", b"two")]
    numbers = [put(stores.content, data).number for data in both]
    for data in both:
        stores.content.delete(digest_of(data))
    stores.content.cleanup([numbers[0]])
    with stores.root.blobs.read() as txn, txn.raw.cursor() as cursor:
        assert [int.from_bytes(bytes(key)[:8], "big") for key, _ in cursor] == [numbers[1]]
    stores.content.cleanup()
    with stores.root.blobs.read() as txn:
        assert txn.raw.stat()["entries"] == 0


def test_bytes_of_many_blobs_are_deleted_in_few_commits(stores, monkeypatch):
    with stores.root.meta.write() as meta, stores.root.blobs.write() as blobs:
        for number in range(1, 301):
            blobs.raw.put(number.to_bytes(8, "big") + bytes(4), b"bytes")
            discard.drop_bytes(meta, number)
    commits = []
    for environment in (stores.root.meta, stores.root.blobs):
        write = environment.write
        monkeypatch.setattr(environment, "write", lambda write=write: commits.append(1) or write())
    stores.content.cleanup()
    with stores.root.blobs.read() as txn:
        assert txn.raw.stat()["entries"] == 0
    assert len(commits) == 10
    assert not records(stores)["trash"]
