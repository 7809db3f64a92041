"""Namespaces: which there are, what is said of them, and when they can go."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from engine.kv import keys
from engine.kv.environment import Transaction
from engine.kv.schema import MOUNTS, MountRecord
from engine.kv.table import Table
from engine.metadata.leases import LeaseStore, leased
from engine.metadata.lineage import MetaStore
from engine.metadata.mounts import MountStore
from engine.metadata.resources import Resource
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.snapshots import Kind
from engine.stores import Stores
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST, records

LONG = "x" * 76


def put(stores: Stores, data: bytes = b"x") -> Descriptor:
    with stores.content.ingest("put", lease="") as writer:
        writer.write(data)
        writer.commit()
    return Descriptor(media_type=MANIFEST, digest=digest_of(data), size=len(data))


@pytest.fixture
def other(stores: Stores) -> Iterator[Stores]:
    """Stores of another namespace on the same root."""
    opened = Stores(stores.root, "other", AMD64)
    yield opened
    opened.close()


def names(stores: Stores) -> list[str]:
    return [record.name for record in stores.namespaces.walk()]


def test_a_namespace_is_there_with_its_first_object(stores: Stores, other: Stores) -> None:
    assert names(stores) == []
    put(other)
    MetaStore(stores.root.meta, "overlay", LONG).create("a", Kind.ACTIVE, "", {}, "")
    MetaStore(stores.root.meta, "copy", "a").create("a", Kind.ACTIVE, "", {}, "")
    LeaseStore(stores.root.meta, "b").create()
    stores.namespaces.create("c")
    assert names(stores) == ["a", "b", "c", "other", LONG]
    assert stores.namespaces.get("other").created == 0
    with pytest.raises(NotFound):
        stores.namespaces.get("default")


def test_a_namespace_is_made_and_labelled(stores: Stores, other: Stores) -> None:
    made = stores.namespaces.create("made", isolated=True, labels={"a": "b", "c": ""})
    assert stores.namespaces.get("made") == made
    assert (made.isolated, made.labels) == (True, {"a": "b"})
    changed = stores.namespaces.update("made", {"a": "", "d": "e"})
    assert (changed.isolated, changed.labels, changed.created) == (True, {"d": "e"}, made.created)
    put(other)
    assert stores.namespaces.update("other", {"x": "y"}).created
    for name in ("made", "other"):
        with pytest.raises(AlreadyExists):
            stores.namespaces.create(name)
    for name in ("../x", "", "a/b", "x" * 77):
        with pytest.raises(InvalidArgument):
            stores.namespaces.create(name)
    with pytest.raises(NotFound):
        stores.namespaces.update("absent", {"x": "y"})
    assert names(stores) == ["made", "other"]


def test_a_namespace_goes_when_nothing_is_left_in_it(stores: Stores, other: Stores) -> None:
    stores.namespaces.create("other", labels={"a": "b"})
    target = put(other)
    other.images.create("a", target)
    other.snapshotter("overlay").prepare("key")
    other.content.ingest("unfinished", lease="").close()
    mount = {
        "target": "/mnt",
        "backend": "overlay",
        "rw": False,
        "image": "a",
        "top": "",
        "state": "kept",
    }
    mount |= {"created": 1, "boot": "", "space": 1, "processes": 1}
    with stores.root.meta.write() as txn:
        MOUNTS.put(txn, MountRecord(key="key", **mount), "other", "key")  # type: ignore[arg-type]
    steps: dict[str, Any] = {
        "images and blobs and ingests and mounts and snapshots": lambda: other.images.remove("a"),
        "blobs and ingests and mounts and snapshots": lambda: other.content.delete(target.key),
        "ingests and mounts and snapshots": lambda: other.content.abort("unfinished"),
        "mounts and snapshots": lambda: MountStore(stores.root.meta, "other").forget("key"),
        "snapshots": lambda: other.snapshotter("overlay").remove("key"),
    }
    for left, step in steps.items():
        with pytest.raises(FailedPrecondition, match=f"namespace other has {left}; remove those first"):
            stores.namespaces.remove("other")
        step()
    stores.namespaces.create("also")
    with pytest.raises(NotFound):
        stores.namespaces.remove("other", "absent")
    stores.namespaces.remove("other", "also")
    assert names(stores) == []


def test_leases_go_with_a_namespace_but_for_those_of_work(stores: Stores, other: Stores) -> None:
    other.leases.create("mine")
    other.leases.add("mine", Resource("content", digest_of(b"x")))
    with leased(stores.root.meta, "other"):
        with pytest.raises(FailedPrecondition, match="is at work in namespace other"):
            stores.namespaces.remove("other")
        assert len(other.leases.walk()) == 2
    stores.namespaces.remove("other")
    assert names(stores) == []
    left = records(stores)
    assert not left["lease_items"]
    assert not left["mentions"]


def test_a_namespace_that_cannot_be_read_is_told_of(stores: Stores) -> None:
    with stores.root.meta.write() as txn:
        txn.raw.put(keys.encode(("bad",)), b"\xc1", db=txn.databases["namespaces"])
    assert names(stores) == []
    assert [lost.name for lost in stores.namespaces.damaged()] == ["bad"]


# -- what it costs ----------------------------------------------------------------------------


def test_what_is_in_a_namespace_is_not_read_to_list_it(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for namespace in ("a", "b"):
        for number in range(50):
            LeaseStore(stores.root.meta, namespace).create(f"{number}")
    steps = []
    branches = Table.branches

    def counted(table: Table[Any], txn: Transaction, *prefix: str) -> Iterator[str]:
        for found in branches(table, txn, *prefix):
            steps.append(found)
            yield found

    monkeypatch.setattr(Table, "branches", counted)
    for method in ("_items", "_decode"):
        monkeypatch.setattr(Table, method, lambda *_: iter(()))
    assert names(stores) == ["a", "b"]
    assert steps == ["a", "b"]


@pytest.mark.parametrize(
    ("beginning", "after"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\x00\x01\xff\xff", b"\x00\x02")]
)
def test_the_least_after_all_keys_that_begin_so(beginning: bytes, after: bytes) -> None:
    assert keys.after(beginning) == after


def test_branches_of_keys_whatever_their_length(stores: Stores) -> None:
    table = Table("leases", MountRecord)
    parts = ["a", "ab", "b", "\U0010ffff", "x" * 128, ""]
    with stores.root.meta.write() as txn:
        for one in parts:
            for two in parts:
                txn.raw.put(keys.encode((one, two, "k")), b"", db=txn.databases["leases"])
        txn.raw.put(keys.encode(("y" * 129, "k")), b"", db=txn.databases["leases"])
        assert sorted(table.branches(txn)) == sorted([*parts, "(a long name)"])
        assert sorted(table.branches(txn, "b")) == sorted(parts)
        assert list(table.branches(txn, "absent")) == []
