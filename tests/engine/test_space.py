"""Freed pages become holes: the space is back, and nobody loses a byte, who reads, writes or dies."""

import errno
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lmdb import verify

from engine.kv import copying, freelist, space
from engine.kv.environment import Environment
from engine.kv.freelist import Meta, Odd
from engine.kv.space import GivenBack, give_back
from engine.mount import Mount, mounted
from engine.testing.archives import archive, layout, member
from tests.command import lamina
from tests.filesystems import formatted, in_memory
from tests.processes import kill, ready

_MAP = 1 << 32
_EXTENT = 4096 * 256 - 16
_FRESH = 2 << 20  # bytes that a file may take beyond what it holds: its own list, a commit or two


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").mkdir()
    return tmp_path / "file"


@pytest.fixture
def file(folder: Path) -> Iterator[Environment]:
    opened = Environment(folder, map_bytes=_MAP)
    yield opened
    opened.close()


def fill(file: Environment, numbers: range) -> None:
    for number in numbers:
        with file.write() as txn:
            txn.raw.put(b"%04d" % number, bytes([number % 251 + 1]) * _EXTENT)


def drop(file: Environment, numbers: range) -> None:
    with file.write() as txn:
        for number in numbers:
            txn.raw.delete(b"%04d" % number)


def numbers_in(file: Environment) -> list[int]:
    """Return which values there are, each of them whole."""
    with file.read() as txn, txn.raw.cursor() as cursor:
        found = [(int(bytes(key)), bytes(value)) for key, value in cursor]
    assert all(value == bytes([number % 251 + 1]) * _EXTENT for number, value in found)
    return [number for number, _ in found]


def taken(folder: Path) -> int:
    return (folder / "data.mdb").stat().st_blocks * 512


def assert_sound(folder: Path) -> None:
    assert verify.verify(str(folder / "data.mdb")) == []


# -- what is free -----------------------------------------------------------------------------


def read_list(folder: Path, page: int) -> tuple[Meta, list[int]]:
    data = (folder / "data.mdb").read_bytes()
    meta = freelist.newest(data, page)
    found: list[int] = []
    for freed in freelist.records(lambda at, count: data[at * page : (at + count) * page], meta):
        runs = list(freelist.runs(freed.pages, meta))
        assert list(freed.pages) == [
            number for run in runs for number in reversed(range(run.first, run.first + run.length))
        ]
        assert all(a.first > b.first + b.length for a, b in itertools.pairwise(runs))
        found += freed.pages
    return meta, found


@pytest.mark.parametrize("seed", range(4))
def test_every_page_is_in_use_or_free_once(folder: Path, seed: int) -> None:
    source = random.Random(seed)
    file = Environment(folder, map_bytes=_MAP, tables=("a", "b"))
    for step in range(300):
        with file.write() as txn:
            for _ in range(source.randrange(12)):
                table, key = txn.databases[source.choice("ab")], b"%d" % source.randrange(200)
                if source.random() < 0.6:
                    txn.raw.put(key, bytes(source.choice([9, 99, 5000, 40000, 400000])), db=table)
                else:
                    txn.raw.delete(key, db=table)
        if step % 20 == 0:
            meta, found = read_list(folder, file.page)
            with file.read() as txn:
                assert meta.txnid == txn.raw.id()
                used = file.used_pages(txn) + meta.pages + 2
            assert len(set(found)) == len(found)
            assert used + len(found) == meta.last + 1
    file.close()
    assert_sound(folder)


def test_tables_of_another_version_are_in_use_too(folder: Path) -> None:
    file = Environment(folder, map_bytes=_MAP, tables=("a", "b", "gone"))
    with file.write() as txn:
        for name in txn.databases:
            for number in range(60):
                txn.raw.put(b"%d" % number, bytes(100_000), db=txn.databases[name])
    with file.write() as txn:
        txn.raw.drop(txn.databases["a"], delete=False)
    file.close()
    file = Environment(folder, map_bytes=_MAP, tables=("a", "b"))
    assert give_back(file).bytes > 5 << 20
    assert give_back(file) == GivenBack()
    copying.compact(file, lambda _done: None)
    file.close()
    file = Environment(folder, map_bytes=_MAP, tables=("a", "b", "gone"))
    with file.read() as txn:
        for name, count in (("a", 0), ("b", 60), ("gone", 60)):
            assert txn.raw.stat(txn.databases[name])["entries"] == count
    file.close()
    assert_sound(folder)


def test_a_list_with_any_other_byte_is_read_or_refused(folder: Path) -> None:
    """Whatever its pages hold, nothing but Odd is raised, and no page outside of the file is free."""
    file = Environment(folder, map_bytes=_MAP)
    fill(file, range(40))
    for number in range(0, 30, 3):
        drop(file, range(number, number + 2))
    meta, expected = read_list(folder, file.page)
    page = file.page
    file.close()
    whole = (folder / "data.mdb").read_bytes()
    pages = {
        number: bytearray(whole[number * page : (number + 1) * page])
        for number in range(meta.last + 1)
        if number in {0, 1, meta.root}
    }
    assert expected

    def read(at: int, count: int) -> bytes:
        if count == 1 and at in pages:
            return bytes(pages[at])
        return whole[at * page : (at + count) * page]

    refused = 0
    source = random.Random("bytes")
    for number, data in pages.items():
        for at in [*range(200), *(source.randrange(page) for _ in range(300))]:
            before = data[at]
            data[at] ^= 1 << source.randrange(8)
            try:
                state = freelist.newest(read(0, 1) + read(1, 1), page)
                runs = [
                    run
                    for freed in freelist.records(read, state)
                    for run in freelist.runs(freed.pages, state)
                ]
                assert all(2 <= run.first <= run.first + run.length - 1 <= state.last for run in runs)
                freelist.merged(runs)
            except Odd:
                refused += 1
            data[at] = before
        assert number == meta.root or refused
    assert refused > 100


def test_free_twice_is_odd() -> None:
    with pytest.raises(Odd, match="page 9 is free twice"):
        freelist.merged([freelist.Run(7, 3), freelist.Run(9, 1)])
    assert freelist.merged([freelist.Run(9, 1), freelist.Run(7, 2)]) == [freelist.Run(7, 3)]


def test_a_collection_gives_the_disk_its_space_again(tmp_path: Path) -> None:
    source = layout(
        tmp_path / "image", [archive(member("big", data=random.Random(1).randbytes(8 << 20)))]
    )
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", source)
    full = taken(root / "blobs.lmdb")
    assert full >= 8 << 20
    lamina(root, "image", "rm", "image")
    lamina(root, "gc")
    assert taken(root / "blobs.lmdb") <= full - (7 << 20)
    lamina(root, "import", "--no-unpack", source)
    lamina(root, "content", "verify")
    assert taken(root / "blobs.lmdb") <= full + _FRESH


# -- giving back ------------------------------------------------------------------------------

_OLD_READER = """
import hashlib, sys
from pathlib import Path
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 32, readonly=True)
def digest(txn):
    running = hashlib.sha256()
    with txn.raw.cursor() as cursor:
        for key, value in cursor:
            running.update(key)
            running.update(value)
    return running.hexdigest()
with file.read() as txn:
    before = digest(txn)
    print("ready", flush=True)
    sys.stdin.readline()
    print(digest(txn) == before, flush=True)
    sys.stdin.readline()
file.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def check_space_comes_back(folder: Path) -> None:
    """Delete most of a store under a reader, before and after he is done, and use it again."""
    folder.mkdir()
    file = Environment(folder, map_bytes=_MAP)
    fill(file, range(24))
    reader = ready(_OLD_READER, folder)
    assert reader.stdin is not None
    assert reader.stdout is not None

    def tell() -> str:
        reader.stdin.write("\n")
        reader.stdin.flush()
        return reader.stdout.readline()

    try:
        full = taken(folder)
        assert full >= 24 << 20
        drop(file, range(4, 24))
        found = give_back(file)
        assert found.bytes == 0
        assert f"process {reader.pid} still reads" in found.why
        assert tell() == "True\n"
        assert tell() == "closed\n"
        found = give_back(file)
        assert found.why == ""
        assert found.bytes >= 19 << 20
        assert taken(folder) <= (4 << 20) + _FRESH
        assert file.unused() <= _FRESH
    finally:
        kill(reader)
    assert give_back(file) == GivenBack()
    assert numbers_in(file) == list(range(4))
    fill(file, range(4, 20))
    size = (folder / "data.mdb").stat().st_size
    assert size <= (25 << 20) + 65536, "what are holes is used again"
    assert numbers_in(file) == list(range(20))
    file.close()
    assert_sound(folder)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_space_comes_back_beside_a_reader(tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk").mkdir()
    with formatted(kind, tmp_path / "image", tmp_path / "disk") as disk:
        check_space_comes_back(disk / "file")


@pytest.mark.root
def test_space_comes_back_in_memory(tmp_path: Path) -> None:
    with in_memory(tmp_path / "disk", 64) as disk:
        check_space_comes_back(disk / "file")


@pytest.mark.root
def test_a_file_system_without_holes_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted([Mount(type="ramfs", source="ramfs", options=[])], tmp_path / "disk"):
        folder = tmp_path / "disk" / "file"
        folder.mkdir()
        file = Environment(folder, map_bytes=_MAP)
        fill(file, range(4))
        drop(file, range(1, 4))
        found = give_back(file)
        assert found.bytes == 0
        assert "no holes; `lamina compact`" in found.why
        assert numbers_in(file) == [0]
        file.close()


def test_some_can_be_spared(file: Environment, folder: Path) -> None:
    fill(file, range(12))
    drop(file, range(12))
    assert give_back(file, spare=12 << 20) == GivenBack()
    found = give_back(file, spare=5 << 20)
    assert 7 << 20 <= found.bytes <= 11 << 20
    assert 1 << 20 <= file.unused() <= 5 << 20


def test_little_is_not_worth_a_commit(file: Environment) -> None:
    with file.write() as txn:
        txn.raw.put(b"a", bytes(400_000))
    with file.write() as txn:
        txn.raw.delete(b"a")
    before = file._env.info()["last_txnid"]
    assert give_back(file) == GivenBack()
    assert file._env.info()["last_txnid"] == before


@contextmanager
def between_slices(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` before each slice, all of which are of one hole."""
    real = space._Giving.slice

    def sliced(self: space._Giving, most: int) -> bool:
        do()
        return real(self, most)

    with monkeypatch.context() as patch:
        patch.setattr(space, "_SLICE_S", 0)
        patch.setattr(space, "_PIECE", 128)
        patch.setattr(space._Giving, "slice", sliced)
        yield


def test_a_slice_that_finds_only_old_holes_is_short_too(
    file: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(file, range(12))
    for number in range(12):
        with file.read():  # so that nobody takes them
            drop(file, range(number, number + 1))
    assert give_back(file).bytes > 11 * _EXTENT
    monkeypatch.setattr(space, "_SLICE_S", 0)
    with space._opened(file) as opened:
        giving = space._Giving(file, opened)
        slices = 1
        while giving.slice(_MAP):
            slices += 1
    assert giving.bytes < _FRESH
    assert slices >= 12


def test_a_list_of_what_is_not_worth_it_is_not_read(
    file: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(file, range(12))
    drop(file, range(8))
    assert give_back(file).bytes > 7 * _EXTENT
    monkeypatch.setattr(space._Giving, "survey", None)
    assert give_back(file) == GivenBack()


@pytest.mark.parametrize("seed", range(4))
def test_others_write_and_read_between_two_slices(
    file: Environment, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """They take free pages, free others and hold states: each of these stays as it was."""
    source = random.Random(seed)
    present: set[int] = set()
    slices = 0
    with ExitStack() as held:
        states: list[tuple[object, ExitStack]] = []

        def begin_to_read() -> None:
            mine = held.enter_context(ExitStack())
            txn = mine.enter_context(file.read())
            states.append(((txn, content(txn)), mine))

        def end_one() -> None:
            (txn, before), mine = states.pop(source.randrange(len(states)))
            assert content(txn) == before
            mine.close()

        def content(txn: object) -> list[tuple[bytes, str]]:
            with txn.raw.cursor() as cursor:  # type: ignore[attr-defined]
                return [(bytes(k), hashlib.md5(v).hexdigest()) for k, v in cursor]

        def meddle() -> None:
            nonlocal slices
            slices += 1
            if slices % 20 > 12:  # else it would never end
                return
            number = source.randrange(12)
            chosen = range(number, number + 1)
            if number in present:
                drop(file, chosen)
            else:
                fill(file, chosen)
            present.symmetric_difference_update(chosen)
            if source.random() < 0.3:
                begin_to_read()
            if states and source.random() < 0.4:
                end_one()

        with between_slices(monkeypatch, meddle):
            for _ in range(3):
                fill(file, range(12))
                present.update(range(12))
                drop(file, range(2, 10))
                present.difference_update(range(2, 10))
                give_back(file)
                assert numbers_in(file) == sorted(present)
        while states:
            end_one()
    assert slices > 20
    assert_sound(folder)


@pytest.mark.parametrize("what", ["accounts", "list", "state"])
def test_nothing_is_given_back_of_a_file_that_is_odd(
    file: Environment, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fill(file, range(8))
    drop(file, range(1, 8))
    before = taken(folder)
    if what == "accounts":
        real = file.used_pages
        monkeypatch.setattr(file, "used_pages", lambda txn: real(txn) - 1)
    elif what == "list":
        monkeypatch.setattr(freelist, "_LEAF", 0x40)
    else:
        monkeypatch.setattr(freelist, "_VERSION", 3)
    found = give_back(file)
    assert found.bytes == 0
    assert "not as expected" in found.why
    assert "lamina compact" in found.why
    assert taken(folder) == before


def test_other_faults_of_the_disk_are_errors(file: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fill(file, range(4))
    drop(file, range(4))
    monkeypatch.setattr(space, "punch_hole", fails)
    with pytest.raises(Exception, match=r"store .*: .*[Ii]nput/output error"):
        give_back(file)
    fill(file, range(4))
    assert numbers_in(file) == list(range(4))


_DYING = """
import sys
from pathlib import Path
from engine import failpoints
from engine.kv import space
from engine.kv.environment import Environment
file = Environment(Path(sys.argv[1]), map_bytes=1 << 32)
space._PIECE = 100
print("ready", flush=True)
failpoints.arm(f"space.punched=kill@{sys.argv[2]}")
space.give_back(file)
"""


@pytest.mark.parametrize("nth", [1, 2, 9, 30])
def test_dying_on_the_way_loses_nothing(folder: Path, nth: int) -> None:
    file = Environment(folder, map_bytes=_MAP)
    fill(file, range(20))
    drop(file, range(3, 18))
    file.close()
    full = taken(folder)
    dying = ready(_DYING, folder, nth)
    dying.communicate()
    assert dying.returncode == -9
    assert taken(folder) < full
    assert_sound(folder)
    file = Environment(folder, map_bytes=_MAP)
    assert numbers_in(file) == [0, 1, 2, 18, 19]
    give_back(file)
    assert taken(folder) <= (5 << 20) + _FRESH
    fill(file, range(3, 18))
    assert numbers_in(file) == list(range(20))
    file.close()
    assert_sound(folder)
