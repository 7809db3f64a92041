"""Ingests: gone on with at the exact offset, cut to nothing, listed, waited for, expired; containerd's
content suite by name, where it applies."""

import hashlib
import subprocess
import sys
import threading

import msgspec
import pytest

from engine import limits
from engine.content.holds import Holds
from engine.content.ingests import BeingWritten
from engine.errors import (
    AlreadyExists,
    DataLoss,
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Refused,
    ResourceExhausted,
    Unavailable,
)
from engine.failpoints import armed
from engine.filters import parse_all
from engine.kv.schema import EXTENT, INGESTS, INLINE, now
from engine.metadata.leases import leased
from engine.oci.digest import Digest, digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
from tests.engine.image_files import extents, records
from tests.engine.test_content import pattern, put

SIZES = [1, INLINE, INLINE + 1, EXTENT - 1, EXTENT, EXTENT + 1, 9 * EXTENT + 7]


def record(stores, ref):
    with stores.root.meta.read() as txn:
        return INGESTS.get(txn, "default", ref)


# -- gone on with -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("known", [True, False])
def test_the_next_writer_begins_where_the_last_one_ended(tmp_path, size, known):
    """Also when the process was another, and also in the middle of an extent."""
    data = pattern(size)
    expect = {"total": size, "expected": digest_of(data)} if known else {}
    stops = sorted({0, 1, size // 3, size // 2, size - 1, size})
    for start, stop in zip([0, *stops], stops, strict=False):
        with Root(tmp_path / "root") as root:
            content = Stores(root, "default", Platform()).content
            with content.ingest("x", lease="", **expect) as writer:
                assert writer.offset == start
                assert writer.digest == digest_of(data[:start])
                writer.write(data[start:stop])
            if stop:
                assert content.status("x").offset == stop
    with Root(tmp_path / "root") as root:
        stores = Stores(root, "default", Platform())
        with stores.content.ingest("x", lease="", **expect) as writer:
            assert writer.commit().digest == digest_of(data)
        assert stores.content.read_all(digest_of(data), size) == data
        stores.content.cleanup()
        assert len(extents(stores)) == -(-size // EXTENT)


def test_nothing_written_leaves_no_trace(stores):
    stores.content.ingest("x", lease="", total=5).close()
    assert not any(records(stores).values())


def test_what_is_known_of_an_ingest_adds_up(stores):
    """One writer knows the size, one the digest: both are held against what is committed."""
    data = pattern(EXTENT + 5)
    with stores.content.ingest("x", lease="", total=len(data)) as writer:
        writer.write(data[:EXTENT])
    with stores.content.ingest("x", lease="", expected=digest_of(data)) as writer:
        assert writer.offset == EXTENT
    status = stores.content.status("x")
    assert (status.total, status.expected) == (len(data), digest_of(data))
    with stores.content.ingest("x", lease="") as writer:
        assert writer.offset == EXTENT
        with pytest.raises(Refused, match="longer"):
            writer.write(bytes(6))


def test_more_than_is_announced_now_begins_anew(stores):
    with stores.content.ingest("x", lease="") as writer:
        writer.write(pattern(EXTENT))
    with stores.content.ingest("x", lease="", total=EXTENT - 1) as writer:
        assert writer.offset == 0


@pytest.mark.parametrize("wrong", ["size", "digest"])
@pytest.mark.parametrize("size", [100, EXTENT + 1])
@pytest.mark.parametrize("when", ["open", "commit"])
def test_a_wrong_size_or_digest_does_not_stick(stores, wrong, size, when):
    data = pattern(size)
    told = {"total": size + 1} if wrong == "size" else {"expected": digest_of(b"other")}
    with stores.content.ingest("x", lease="", **(told if when == "open" else {})) as writer:
        writer.write(data)
        with pytest.raises(Refused if wrong == "size" else DigestMismatch):
            writer.commit(
                **(
                    {}
                    if when == "open"
                    else {"size": told.get("total"), "expected": told.get("expected")}
                )
            )
        with pytest.raises(FailedPrecondition, match="closed"):
            writer.write(b"more")
    assert not extents(stores)
    with pytest.raises(NotFound):
        stores.content.status("x")
    assert put(stores.content, data, total=size, expected=digest_of(data)).size == size


def test_a_digest_of_another_kind_is_known_at_commit(stores):
    data = pattern(2 * EXTENT + 5)
    sha512 = Digest("sha512:" + hashlib.sha512(data).hexdigest())
    with stores.content.ingest("x", lease="") as writer:
        writer.write(data)
        assert writer.commit(size=len(data), expected=sha512).digest == sha512
    assert stores.content.verify(sha512) == len(data)
    with stores.content.ingest("x", lease="") as writer:
        writer.write(data)
        with pytest.raises(DigestMismatch):
            writer.commit(expected=Digest("sha512:" + hashlib.sha512(b"").hexdigest()))


@pytest.mark.parametrize("size", [100, EXTENT, 2 * EXTENT + 5])
def test_truncated_to_nothing(stores, size):
    with stores.content.ingest("x", lease="", total=3 * EXTENT) as writer:
        writer.write(pattern(size))
    with stores.content.ingest("x", lease="", total=3 * EXTENT) as writer:
        assert writer.offset == size
        with pytest.raises(InvalidArgument):
            writer.truncate(1)
        writer.truncate(0)
        assert (writer.offset, writer.digest) == (0, digest_of(b""))
        assert not extents(stores)
        data = pattern(3 * EXTENT, b"other")
        writer.write(data)
        assert writer.commit().digest == digest_of(data)
    stores.content.cleanup()
    assert len(extents(stores)) == 3


def test_truncated_after_an_abort(stores):
    with stores.content.ingest("x", lease="") as writer:
        writer.write(pattern(EXTENT))
        stores.content.abort("x")
        with pytest.raises(FailedPrecondition, match="aborted"):
            writer.truncate()
    stores.content.cleanup()
    assert not any(records(stores).values())
    assert not extents(stores)


def test_what_was_written_after_an_abort_goes_when_the_writer_is_closed(stores):
    with stores.content.ingest("x", lease="") as writer:
        stores.content.abort("x")
        stores.content.cleanup()
        writer.write(pattern(EXTENT + 5))
    assert not extents(stores)
    assert not any(records(stores).values())


@pytest.mark.parametrize("step", ["content.ingest.written", "content.commit.before"])
def test_a_failure_leaves_what_is_durable(stores, step):
    data = pattern(2 * EXTENT + 5)
    writer = stores.content.ingest("x", lease="", total=len(data))
    with armed(step, "error"), pytest.raises(EngineError, match="failpoint"):  # noqa: PT012
        writer.write(data)
        writer.commit()
    with pytest.raises(FailedPrecondition, match="closed"):
        writer.write(b"")
    offset = stores.content.status("x").offset
    with stores.content.ingest("x", lease="", total=len(data)) as writer:
        assert writer.offset == offset >= 2 * EXTENT
        writer.write(data[offset:])
        assert writer.commit().digest == digest_of(data)


@pytest.mark.parametrize("step", ["content.ingest.written", "content.commit.before"])
def test_who_failed_keeps_nobody_out(stores, step):
    """The process lives on, as a daemon does: another one goes on with it, or it expires."""
    data = pattern(2 * EXTENT + 5)
    writer = stores.content.ingest("x", lease="", total=len(data))
    with armed(step, "error"), pytest.raises(EngineError, match="failpoint"):  # noqa: PT012
        writer.write(data)
        writer.commit()
    assert not record(stores, "x").owner.id
    assert record(stores, "x").expires


def test_a_close_that_fails_keeps_nobody_out(stores, monkeypatch):
    writer = stores.content.ingest("x", lease="", total=2 * EXTENT)
    writer.write(b"tail")

    def full(*_):
        raise ResourceExhausted("no room")

    with monkeypatch.context() as patch, pytest.raises(ResourceExhausted):  # noqa: PT012
        patch.setattr("engine.content.extents.append", full)
        writer.close()
    assert not record(stores, "x").owner.id


def test_a_resumption_that_fails_keeps_nobody_out(stores, monkeypatch):
    with stores.content.ingest("x", lease="", total=2 * EXTENT) as writer:
        writer.write(bytes(EXTENT))

    def unreadable(*_):
        raise DataLoss("gone")

    with monkeypatch.context() as patch, pytest.raises(DataLoss):  # noqa: PT012
        patch.setattr("engine.content.extents.feed", unreadable)
        stores.content.ingest("x", lease="", total=2 * EXTENT)
    assert not record(stores, "x").owner.id


def test_a_failure_after_the_commit_leaves_the_blob(stores):
    data = pattern(2 * EXTENT)
    writer = stores.content.ingest("x", lease="", total=len(data))
    writer.write(data)
    with armed("content.commit.after", "error"), pytest.raises(EngineError, match="failpoint"):
        writer.commit()
    stores.content.cleanup()
    assert stores.content.read_all(digest_of(data), len(data)) == data


# -- one writer ---------------------------------------------------------------------------------

_CHILD = """
import os, sys
from pathlib import Path
from engine.kv.schema import EXTENT
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
root = Root(Path(sys.argv[1]))
content = Stores(root, "default", Platform(os="linux", architecture="amd64")).content
writer = content.ingest("x", lease="", total=int(sys.argv[2]))
writer.write(bytes(min(EXTENT + 5, int(sys.argv[2]))))
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[3:] == ["more"]:
    writer.write(bytes(EXTENT))
    print("written", flush=True)
    sys.stdin.readline()
elif len(sys.argv) > 3:
    writer.close()
    print("closed", flush=True)
    sys.stdin.readline()
os._exit(0)
"""


def child(stores, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(stores.root.path), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_writer_is_noticed_at_once(stores):
    process = child(stores, 2 * EXTENT)
    with pytest.raises(BeingWritten, match=str(process.pid)):
        stores.content.ingest("x", lease="", total=2 * EXTENT)
    process.kill()
    process.communicate()
    with stores.content.ingest("x", lease="", total=2 * EXTENT) as writer:
        assert writer.offset == EXTENT  # the whole extents that it wrote


def test_what_a_killed_writer_wrote_after_an_abort_goes_too(stores):
    process = child(stores, 3 * EXTENT, "more")
    try:
        stores.content.abort("x")
        stores.content.cleanup()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "written\n"
        stores.content.cleanup()
        assert extents(stores)  # someone is writing them
    finally:
        process.kill()
        process.communicate()
    stores.content.cleanup()
    assert extents(stores) == []


def test_an_ingest_that_is_dropped_as_it_is_opened_leaves_nothing(stores, monkeypatch):
    take = Holds.take

    def late(holds, number):
        monkeypatch.setattr(Holds, "take", take)
        stores.content.abort("x")
        stores.content.cleanup()
        return holds.take(number)

    monkeypatch.setattr(Holds, "take", late)
    with pytest.raises(FailedPrecondition, match="aborted"):
        stores.content.ingest("x", lease="")
    with stores.content.ingest("x", lease="") as writer:
        writer.write(bytes(EXTENT))
        writer.abort()
    assert extents(stores) == []


def test_two_processes_write_one_small_blob(stores):
    """Neither has a record; whoever commits first has made it."""
    process = child(stores, 100, "close")
    try:
        with stores.content.ingest("x", lease="", total=100) as writer:
            writer.write(bytes(100))
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "closed\n"  # which keeps it to be resumed
            assert stores.content.status("x").offset == 100
            assert writer.commit().digest == digest_of(bytes(100))
    finally:
        process.communicate("\n")
    assert stores.content.verify(digest_of(bytes(100))) == 100
    assert stores.content.status("x").offset == 100


def test_a_closed_small_writer_leaves_anothers_record(stores):
    other = Stores(stores.root, "default", Platform())
    with stores.content.ingest("x", lease="", total=100) as writer:
        writer.write(b"one")
        stores.root.owners.release("default", "x")  # which another process never claimed
        with other.content.ingest("x", lease="", total=100) as second:
            second.write(b"second")
    assert stores.content.status("x").offset == len(b"second")


def test_waiting_ends_when_the_writer_of_this_process_is_closed(stores, monkeypatch):
    monkeypatch.setattr("engine.content.ingests._POLL_S", 60)
    monkeypatch.setattr("engine.content.ingests.time.sleep", lambda _: None)  # closed before the wait
    writer = stores.content.ingest("x", lease="")
    tries = threading.Semaphore(0)

    def begin():
        while True:
            try:
                stores.content.ingest("x", lease="").close()
            except BeingWritten:
                tries.release()
                stores.content.wait("x")
            else:
                return

    thread = threading.Thread(target=begin)
    thread.start()
    assert tries.acquire(timeout=10)
    writer.close()
    thread.join(10)
    assert not thread.is_alive()


# -- status, abort, expiry ----------------------------------------------------------------------


def test_statuses_by_filter(stores):
    for ref in ("layer-1", "layer-2", "config"):
        with stores.content.ingest(ref, lease="") as writer:
            writer.write(ref.encode())
    found = stores.content.statuses(parse_all(["ref~=^layer", "ref==config"]))
    assert {status.ref: status.offset for status in found} == {"layer-1": 7, "layer-2": 7, "config": 6}
    assert [s.ref for s in stores.content.statuses(parse_all(["ref==layer-2"]))] == ["layer-2"]


def test_status_of_what_is_not_there(stores):
    for call in (stores.content.status, stores.content.abort):
        with pytest.raises(NotFound, match="no ingest"):
            call("x")
    with pytest.raises(InvalidArgument):
        stores.content.ingest("", lease="")


def set_idle(stores, ref, seconds):
    """Make an ingest one that was let go so long ago."""
    with stores.root.meta.write() as txn:
        old = INGESTS.get(txn, "default", ref)
        changed = msgspec.structs.replace(old, expires=old.expires - seconds * 10**9)
        INGESTS.put(txn, changed, "default", ref)


def test_gc_06_an_idle_ingest_expires(stores):
    """Also one whose writer was closed by a process that goes on."""
    data = pattern(EXTENT)
    at = now()
    for ref in ("x", "y"):
        with stores.content.ingest(ref, lease="") as writer:
            writer.write(data)
    life = limits.INGEST_LIFE_S
    assert at <= record(stores, "x").expires - life * 10**9 <= now()
    set_idle(stores, "x", life - 60)
    set_idle(stores, "y", life + 1)
    stores.collect()
    assert [status.ref for status in stores.content.statuses()] == ["x"]
    with stores.content.ingest("z", lease="") as writer:
        set_idle(stores, "z", life + 1)
        stores.collect()
        assert stores.content.status("z").offset == 0  # it has a writer
        writer.abort()
    # Whoever goes on with it makes it last.
    stores.content.ingest("x", lease="").close()
    assert record(stores, "x").expires >= at + life * 10**9


def test_gc_06_an_ingest_is_its_leases(stores):
    with leased(stores.root.meta, "default") as one, leased(stores.root.meta, "default") as two:
        with stores.content.ingest("x", lease=one) as writer:
            writer.write(pattern(EXTENT))
        stores.content.ingest("x", lease=two).close()
        stores.give_up(one, seconds=10)
        assert stores.content.status("x").offset == EXTENT  # what it made is the other's now
        stores.give_up(two, seconds=10)
        assert not stores.content.statuses()
    assert not extents(stores)


# -- containerd's content suite (core/content/testsuite), by name ---------------------------------


def test_suite_writer(stores):
    writers = {}
    blobs = [pattern(size, bytes([size % 251])) for size in (100, 2000, EXTENT, 2 * EXTENT + 1)]
    for data in blobs:
        ref = str(len(data))
        writers[ref] = stores.content.ingest(ref, lease="")
        writers[ref].write(data)
    assert {status.ref for status in stores.content.statuses()} == writers.keys()
    for data in blobs:
        ref = str(len(data))
        assert writers[ref].commit(size=len(data), expected=digest_of(data)).size == len(data)
        assert stores.content.read_all(digest_of(data), len(data)) == data
    assert not stores.content.statuses()


def test_suite_update_status(stores):
    writer = stores.content.ingest("x", lease="")
    begun = stores.content.status("x")
    assert (begun.offset, begun.total) == (0, None)
    assert begun.started <= begun.updated <= now()
    writer.write(pattern(EXTENT))
    assert stores.content.status("x").offset == writer.offset == EXTENT
    writer.write(b"tail")
    writer.close()
    done = stores.content.status("x")
    assert done.offset == EXTENT + 4
    assert done.updated >= begun.updated
    assert done.started == begun.started


@pytest.mark.parametrize("expect", [True, False])
def test_suite_commit_exists(stores, expect):
    """At the beginning it is told, at commit the earlier one is the blob; the ingest is gone."""
    data = pattern(300)
    first = put(stores.content, data)
    if expect:
        with pytest.raises(AlreadyExists):
            stores.content.ingest("x", lease="", expected=first.digest)
    else:
        with stores.content.ingest("x", lease="") as writer:
            writer.write(data)
            assert writer.commit().number == first.number
    with pytest.raises(NotFound):
        stores.content.status("x")


@pytest.mark.parametrize("how", ["resume", "truncate", "discard", "copy"])
def test_suite_resume(stores, how):
    data = pattern(2 * EXTENT + 77)
    expect = {"total": len(data), "expected": digest_of(data)}
    with stores.content.ingest("x", lease="", **expect) as writer:
        writer.write(data[: EXTENT + 3])
        with pytest.raises(Unavailable):
            stores.content.ingest("x", lease="", **expect)
    if how == "discard":
        stores.content.abort("x")
    with stores.content.ingest("x", lease="", **expect) as writer:
        assert writer.offset == (0 if how == "discard" else EXTENT + 3)
        if how == "truncate":
            writer.truncate()
        for start in range(writer.offset, len(data), 1 << 15):
            writer.write(data[start : start + (1 << 15)])
        assert writer.commit().digest == digest_of(data)
    assert stores.content.verify(digest_of(data)) == len(data)
    with pytest.raises(NotFound):
        stores.content.status("x")


def test_suite_small_blob(stores):
    for data in (b"", b"foobar"):
        with stores.content.ingest("x", lease="", total=len(data), expected=digest_of(data)) as writer:
            writer.write(data)
            writer.commit(size=len(data), expected=digest_of(data))
        with stores.content.open(digest_of(data)) as reader:
            assert reader.read_at(0, 100) == data


def test_suite_labels(stores):
    digest = put(stores.content, b"data", labels={"k1": "v1", "k2": "v2"}).digest
    update = stores.content.update_fields
    assert update(digest, {"k1": "newvalue"}, ["labels.k1"]).labels == {"k1": "newvalue", "k2": "v2"}
    assert update(digest, {"k3.a/b": "3"}, ["labels.k3.a/b", "labels.k2"]).labels == {
        "k1": "newvalue",
        "k3.a/b": "3",
    }
    before = stores.content.info(digest)
    assert update(digest, {"only": "this", "not": ""}).labels == {"only": "this"}
    assert update(digest, {}, ["labels"]).labels == {}
    assert stores.content.info(digest).updated >= before.updated
    with pytest.raises(InvalidArgument):
        update(digest, {}, ["size"])
    with pytest.raises(NotFound):
        update(digest_of(b"absent"), {})


@pytest.mark.parametrize("size", [4, EXTENT + 4])
def test_suite_commit_error_state(stores, size):
    """After a commit that failed the reference is free, and the next one begins at nothing."""
    data = pattern(size)
    for wrong in ({"size": size + 1}, {"size": size - 1}, {"expected": digest_of(b"other")}):
        with stores.content.ingest("x", lease="") as writer:
            assert writer.offset == 0
            writer.write(data)
            with pytest.raises(Refused):
                writer.commit(**wrong)
            for call in (writer.commit, writer.truncate):
                with pytest.raises(FailedPrecondition):
                    call()
        assert not stores.content.statuses()
    assert put(stores.content, data).size == size
