"""Keys and tables: what is written is found, under its own key and no other."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataLoss
from engine.kv import keys
from engine.kv.growth import ROOM, grow
from engine.kv.schema import COUNTERS, IMAGES, LEASES, Lease
from engine.kv.table import Damaged
from engine.root import Root

_TEXT = st.text(max_size=200).filter(lambda text: len(text.encode()) < 600)
_KEYS = st.lists(_TEXT, min_size=1, max_size=3)


@given(_KEYS, _KEYS)
def test_keys_are_equal_exactly_for_equal_parts(one, other):
    """No part reaches into the next, however long or odd it is."""
    assert (keys.encode(one) == keys.encode(other)) == (one == other)


@given(_KEYS, _KEYS)
def test_a_key_begins_with_another_exactly_for_its_parts(whole, leading):
    begins = keys.encode(whole).startswith(keys.encode(leading))
    assert begins == (whole[: len(leading)] == leading)


@given(_KEYS)
def test_keys_fit_in_lmdb(parts):
    assert len(keys.encode([*parts, "x" * 1000])) <= 511


@pytest.mark.parametrize("length", [127, 128, 129, 511, 512, 5000])
def test_long_parts_stay_apart(length):
    encoded = {keys.encode(["x" * length + last]) for last in "abc"}
    assert len(encoded) == 3


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_numbers_sort_as_numbers(one, other):
    assert (keys.encode(["a", one]) < keys.encode(["a", other])) == (one < other)


def lease(name: str) -> Lease:
    return Lease(id=name, created=1)


def test_scan_finds_a_prefix_and_nothing_else(tmp_path):
    namespaces = ["a", "aa", "b", "", "a" * 300, "a" * 301]
    with Root(tmp_path / "root") as root:
        with root.meta.write() as txn:
            for namespace in namespaces:
                for name in ("1", "2"):
                    LEASES.put(txn, lease(f"{namespace} {name}"), namespace, name)
        with root.meta.read() as txn:
            for namespace in namespaces:
                found = {record.id for record in LEASES.scan(txn, namespace)}
                assert found == {f"{namespace} 1", f"{namespace} 2"}
            assert len(LEASES.scan(txn)) == 12
            assert not LEASES.any(txn, "c")
            assert LEASES.get(txn, "a", "3") is None


def test_an_error_undoes_all_of_a_transaction(tmp_path):
    with Root(tmp_path / "root") as root:
        with pytest.raises(ZeroDivisionError), root.meta.write() as txn:  # noqa: PT012  what came before is undone
            LEASES.put(txn, lease("x"), "a", "x")
            COUNTERS.next(txn, "blob")
            raise ZeroDivisionError
        with root.meta.write() as txn:
            assert not LEASES.any(txn)
            assert COUNTERS.next(txn, "blob") == 1


def test_numbers_are_given_out_once(tmp_path):
    numbers = []
    for _ in range(3):
        with Root(tmp_path / "root") as root, root.meta.write() as txn:
            numbers += [COUNTERS.next(txn, "blob"), COUNTERS.next(txn, "blob")]
            assert COUNTERS.next(txn, f"other {len(numbers)}") == 1
    assert numbers == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03"])
def test_a_damaged_record_is_data_loss(tmp_path, damage):
    with Root(tmp_path / "root") as root:
        with root.meta.write() as txn:
            txn.raw.put(keys.encode(["a", "x"]), damage or b"\x00", db=txn.databases["images"])
        with root.meta.read() as txn, pytest.raises(DataLoss, match="images"):
            IMAGES.get(txn, "a", "x")


def test_records_of_a_later_version_keep_what_is_known(tmp_path):
    """A field that this version does not know is no damage: formats grow by adding."""
    import msgspec

    value = {"version": 2, "id": "x", "created": 1, "colour": "blue"}
    with Root(tmp_path / "root") as root:
        with root.meta.write() as txn:
            txn.raw.put(
                keys.encode(["a", "x"]), msgspec.msgpack.encode(value), db=txn.databases["leases"]
            )
        with root.meta.read() as txn:
            assert LEASES.get(txn, "a", "x") == Lease(version=2, id="x", created=1)


@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_record_is_another_one_or_is_told(at, value, tmp_path_factory):
    # A byte that makes text no text is damage too, not an error of another kind.
    with Root(tmp_path_factory.mktemp("kv") / "root") as root:
        with root.meta.write() as txn:
            LEASES.put(txn, Lease(id="héld" * 15, created=1), "ns", "held")
            key = keys.encode(["ns", "held"])
            raw = bytearray(txn.raw.get(key, db=txn.databases[LEASES.name]))
            raw[at % len(raw)] = value
            txn.raw.put(key, bytes(raw), db=txn.databases[LEASES.name])
        with root.meta.read() as txn:
            found, damaged = LEASES.survey(txn, "ns")
            assert len(found) + len(damaged) == 1


def test_a_walk_is_of_short_transactions(tmp_path, monkeypatch):
    """Nobody is held up between two batches; what is there all the time is there once."""
    monkeypatch.setattr("engine.kv.table._PAGE", 3)
    with Root(tmp_path / "root") as root:
        with root.meta.write() as txn:
            for name in map(str, range(10)):
                LEASES.put(txn, lease(name), "a", name)
                LEASES.put(txn, lease(f"of b {name}"), "b", name)
            txn.raw.put(keys.encode(["a", "6"]), b"\xff", db=txn.databases["leases"])
        found = []
        for record in LEASES.walk(root.meta, "a"):
            found.append(record.name if isinstance(record, Damaged) else record.id)
            assert not root.meta.readers()
            if found[-1] == "4":
                with root.meta.write() as txn:
                    for gone in "358":  # read, of the batch that is being read, and to be read
                        LEASES.delete(txn, "a", gone)
                    LEASES.put(txn, lease("late"), "a", "66")
        assert found == ["0", "1", "2", "3", "4", "5", "6", "7", "9", "late"]
        assert list(LEASES.walk(root.meta, "c")) == []


def test_records_have_room_ahead_of_them(tmp_path):
    """What small transactions write is there already, so that flushing it writes no journal."""
    with Root(tmp_path / "root") as root:
        file = tmp_path / "root" / "meta.lmdb" / "data.mdb"
        sizes = set()
        for number in range(300):
            with root.meta.write() as txn:
                LEASES.put(txn, Lease(id="x" * 8000, created=1), "a", str(number))
            sizes.add(file.stat().st_size)
        assert 2 <= len(sizes) <= 6
    with Root(tmp_path / "root") as root, root.meta.read() as txn:
        assert len(LEASES.scan(txn, "a")) == 300


@pytest.mark.parametrize("failure", ["pwrite", "open"])
def test_a_file_that_cannot_grow_ahead_is_no_error(tmp_path, monkeypatch, failure):
    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, "")

    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    monkeypatch.setattr(f"engine.kv.growth.os.{failure}", fail)
    assert grow(file, 4096 + ROOM) == 0
    monkeypatch.undo()
    assert file.stat().st_size == 4096
    for _ in range(2):  # LMDB has come further than the file
        assert grow(file, 8192 + ROOM) == 8192 + (1 << 20)
        assert file.stat().st_size == 8192 + (1 << 20)
