"""Readers: anywhere in a blob, without a copy, whoever deletes it meanwhile, in any process."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from engine.content.holds import Holds
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from engine.kv.schema import EXTENT, INLINE
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
from tests.engine.image_files import extents, records
from tests.engine.test_content import pattern, put

SIZES = [0, 1, INLINE, INLINE + 1, EXTENT, EXTENT + 1, 3 * EXTENT + 7]


@pytest.mark.parametrize("size", SIZES)
def test_any_part_of_a_blob(stores, size):
    data = pattern(size)
    with stores.content.open(put(stores.content, data).digest) as reader:
        assert reader.size == size
        assert b"".join(reader.pieces()) == data
        for offset in {0, 1, size // 2, EXTENT - 1, EXTENT, size - 1, size, size + 1}:
            if offset >= 0:
                for count in (0, 1, 100, EXTENT, size + 1):
                    assert reader.read_at(offset, count) == data[offset : offset + count]
        running = hashlib.sha256()
        reader.feed(running.update)
        assert running.hexdigest() == digest_of(data)[7:]


@pytest.mark.parametrize("size", [100, INLINE + 1])
def test_small_blobs_are_read_alike_wherever_they_lie(stores, size):
    """What is announced lies beside its record, what was resumed in extents."""
    data = pattern(size)
    with stores.content.ingest("x", lease="") as writer:
        writer.write(data[:50])
    with stores.content.ingest("x", lease="") as writer:
        writer.write(data[50:])
        writer.commit()
    assert len(extents(stores)) == 1
    with stores.content.open(digest_of(data)) as reader:
        assert reader.read_at(20, size) == data[20:]
    stores.content.delete(digest_of(data))
    put(stores.content, data, total=size)
    stores.content.cleanup()
    assert len(extents(stores)) == (size > INLINE)
    assert stores.content.read_all(digest_of(data), size) == data


@pytest.mark.parametrize("size", [100, 2 * EXTENT])
def test_a_view_is_of_bytes_as_they_lie_and_dies_with_its_block(stores, size):
    data = pattern(size)
    with stores.content.open(put(stores.content, data).digest) as reader:
        with reader.view(10, EXTENT) as view:
            assert view.readonly
            assert bytes(view) == data[10 : min(size, EXTENT)]
        with pytest.raises(ValueError, match="released"):
            bytes(view)
        with reader.view(size, 5) as nothing:
            assert len(nothing) == 0


def test_a_reader_is_asked_for_what_there_can_be(stores):
    reader = stores.content.open(put(stores.content, b"data").digest)
    for offset, size in ((-1, 1), (0, -1)):
        with pytest.raises(InvalidArgument), reader.view(offset, size):
            pass
    reader.close()
    reader.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        reader.read_at(0, 1)
    with pytest.raises(NotFound):
        stores.content.open(digest_of(b"absent"))


@pytest.mark.parametrize("size", [100, 2 * EXTENT + 5])
def test_gc_10_bytes_stay_as_long_as_they_are_read(stores, size):
    data = pattern(size)
    digest = put(stores.content, data).digest
    with stores.content.open(digest) as one, stores.content.open(digest) as two:
        pieces = stores.content.read(digest)
        first = next(pieces)
        stores.content.delete(digest)
        stores.content.cleanup()
        with pytest.raises(NotFound):
            stores.content.open(digest)
        assert one.read_at(0, size) == two.read_at(0, size) == data
        assert first + b"".join(pieces) == data
        one.close()
        stores.content.cleanup()
        assert two.read_at(0, size) == data
    stores.content.cleanup()
    assert not extents(stores)
    assert not any(records(stores).values())


def test_a_reader_has_the_bytes_that_it_opened(stores):
    """The same digest, brought back, has another number."""
    data = pattern(EXTENT + 1)
    old = put(stores.content, data)
    with stores.content.open(old.digest) as reader:
        stores.content.delete(old.digest)
        new = put(stores.content, data)
        stores.content.cleanup()
        assert reader.read_at(0, len(data)) == data
        assert {number for number, _ in extents(stores)} == {old.number, new.number}
    stores.content.cleanup()
    assert {number for number, _ in extents(stores)} == {new.number}


@pytest.mark.parametrize("back", [True, False])
def test_a_deletion_between_the_look_and_the_hold(stores, monkeypatch, back):
    """Whoever locks looks again: the record may have gone, or name other bytes by then."""
    data = pattern(EXTENT)
    old = put(stores.content, data)
    take = Holds.take

    def deleting(self, number):
        monkeypatch.setattr(Holds, "take", take)
        stores.content.delete(old.digest)
        if back:
            put(stores.content, data)
        stores.content.cleanup()
        return take(self, number)

    monkeypatch.setattr(Holds, "take", deleting)
    if back:
        with stores.content.open(old.digest) as reader:
            assert reader.blob.number > old.number
            assert reader.read_at(0, EXTENT) == data
    else:
        with pytest.raises(NotFound):
            stores.content.open(old.digest)
    stores.content.cleanup()
    assert len(extents(stores)) == back


_READER = """
import sys
from pathlib import Path
from engine.oci.digest import digest_of, parse_digest
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores
with Root(Path(sys.argv[1]), readonly=sys.argv[3] == "readonly") as root:
    content = Stores(root, "default", Platform(os="linux", architecture="amd64")).content
    with content.open(parse_digest(sys.argv[2])) as reader:
        print("open", flush=True)
        sys.stdin.readline()
        print(digest_of(reader.read_at(0, reader.size)), flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["writing", "readonly"])
@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_reader_in_another_process(stores, how, end):
    digest = put(stores.content, pattern(2 * EXTENT)).digest
    with stores.content.open(digest):
        pass  # there is a file to lock from now on
    child = subprocess.Popen(
        [sys.executable, "-c", _READER, str(stores.root.path), digest, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "open\n"
        stores.content.delete(digest)
        stores.content.cleanup()
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == digest
        assert len(extents(stores)) == 2
        if end:
            child.send_signal(end)
    finally:
        child.communicate("\n")
    stores.content.cleanup()
    assert not extents(stores)


def without_holds(root, data):
    """Make a store that nobody has opened to write since there is a file of holds; return the blob."""
    with Root(root) as opened:
        assert (root / "readers").exists(), "who opens to write makes it"
        digest = put(Stores(opened, "default", Platform()).content, data).digest
    (root / "readers").unlink()
    return digest


_COLLECTOR = """
import sys
from pathlib import Path
from engine.content.store import ContentStore
from engine.root import Root
with Root(Path(sys.argv[1])) as root:
    content = ContentStore(root.meta, root.blobs, "default")
    content.delete(sys.argv[2])
    content.cleanup()
"""


def test_who_only_reads_holds_too(tmp_path):
    """Else a collection beside `content get` would take the second half of it."""
    root, data = tmp_path / "root", pattern(EXTENT + 1)
    digest = without_holds(root, data)
    with Root(root, readonly=True) as opened:
        content = Stores(opened, "default", Platform()).content
        with content.open(digest) as reader:
            subprocess.run([sys.executable, "-c", _COLLECTOR, str(root), digest], check=True)
            assert reader.read_at(0, len(data)) == data


@pytest.mark.parametrize("why", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_store_that_cannot_be_written_is_read_without_holds(tmp_path, monkeypatch, why):
    root, data = tmp_path / "root", pattern(EXTENT + 1)
    digest, real = without_holds(root, data), os.open

    def refusing(path, flags, *more, **options):
        if flags & os.O_CREAT and str(path).endswith("/readers"):
            raise OSError(why, os.strerror(why))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    with Root(root, readonly=True) as opened:
        assert Stores(opened, "default", Platform()).content.verify(digest) == len(data)
    assert not (root / "readers").exists()


def test_threads_share_a_reader(stores):
    data = pattern(3 * EXTENT)
    with stores.content.open(put(stores.content, data).digest) as reader:
        found = {}

        def read(part):
            found[part] = reader.read_at(part * EXTENT // 2, EXTENT)

        threads = [threading.Thread(target=read, args=(part,)) for part in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {part: data[part * EXTENT // 2 :][:EXTENT] for part in range(5)}


def test_a_reading_that_is_given_up_lets_go(stores):
    digest = put(stores.content, pattern(2 * EXTENT)).digest
    before = len(os.listdir("/proc/self/fd"))
    never = stores.content.read(digest)
    pieces = stores.content.read(digest)
    next(pieces)
    pieces.close()
    assert len(os.listdir("/proc/self/fd")) == before
    del never


def test_a_reader_of_damage_says_so(stores):
    digest = put(stores.content, pattern(2 * EXTENT)).digest
    ((number, _), _) = extents(stores)
    with stores.root.blobs.write() as txn:
        txn.raw.delete(number.to_bytes(8, "big") + (1).to_bytes(4, "big"))
    with stores.content.open(digest) as reader:
        assert len(reader.read_at(0, EXTENT)) == EXTENT
        with pytest.raises(DataLoss):
            reader.read_at(EXTENT - 1, 2)
