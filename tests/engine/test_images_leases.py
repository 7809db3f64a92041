"""Names and pins: what images, leases and the lineage of snapshots promise as records."""

import msgspec
import pytest

from engine.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.kv.schema import IMAGES, LEASE_ITEMS, LEASES, Lease, LeaseItem, now
from engine.metadata import leases, ledger
from engine.metadata.images import ImageStore
from engine.metadata.leases import leased
from engine.metadata.lineage import Committing, MetaStore
from engine.metadata.nodes import CONTENT, LEASE, Node, blob_node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.snapshots import Commit, Kind, Usage
from engine.times import rfc3339
from tests.engine.image_files import MANIFEST, records

FULL = "docker.io/library/alpine:latest"


def blob(stores, data: bytes) -> Descriptor:
    with stores.content.ingest(f"put {digest_of(data)}", lease="") as writer:
        writer.write(data)
        writer.commit()
    return Descriptor(media_type=MANIFEST, digest=digest_of(data), size=len(data))


# -- images -----------------------------------------------------------------------------------


def test_any_form_of_a_name_finds_the_image(stores):
    target = blob(stores, b"one")
    (image,) = stores.images.put_all({"alpine": target})
    assert (image.name, image.target) == (FULL, target)
    for name in ("alpine", "library/alpine:latest", "docker.io/alpine", FULL):
        assert stores.images.get(name) == image
    for name in ("alpine:3", "quay.io/alpine", "library/alpine2"):
        with pytest.raises(NotFound):
            stores.images.get(name)


@pytest.mark.parametrize("method", ["get", "remove"])
@pytest.mark.parametrize(("name", "error"), [("absent", NotFound), ("Not A Name", InvalidArgument)])
def test_no_such_image(stores, method, name, error):
    with pytest.raises(error):
        getattr(stores.images, method)(name)


def test_a_name_needs_its_blob(stores):
    """A name appears only after everything that it names is in the store."""
    absent = Descriptor(media_type=MANIFEST, digest=digest_of(b"absent"), size=6)
    with pytest.raises(NotFound, match=absent.digest):
        stores.images.put_all({"a": blob(stores, b"one"), "b": absent})
    assert not stores.images.walk()


def test_a_name_is_taken(stores):
    one, two = blob(stores, b"one"), blob(stores, b"two")
    (first,) = stores.images.put_all({"a": one})
    assert stores.images.put_all({"a": one}) == [first]
    with pytest.raises(AlreadyExists):
        stores.images.put_all({"b": two, "a": two})
    assert [image.target for image in stores.images.walk()] == [one]


def test_a_name_moves_and_keeps_its_labels(stores):
    one, two = blob(stores, b"one"), blob(stores, b"two")
    (first,) = stores.images.put_all({"a": one})
    with stores.root.meta.write() as txn:
        IMAGES.put(txn, msgspec.structs.replace(first, labels={"k": "v"}), "default", first.name)
    (moved,) = stores.images.put_all({"a": two}, replace=True)
    assert (moved.target, moved.labels, moved.created) == (two, {"k": "v"}, first.created)
    assert moved.updated >= first.updated


def test_images_are_listed_by_name(stores):
    target = blob(stores, b"one")
    stores.images.put_all(dict.fromkeys(["b", "x" * 200, "a", "quay.io/c"], target))
    names = [image.name for image in stores.images.walk()]
    assert names == sorted(names)
    assert len(names) == 4


def test_a_removed_name(stores):
    stores.images.put_all(dict.fromkeys(["a", "b"], blob(stores, b"one")))
    stores.images.remove("a")
    assert [image.name for image in stores.images.walk()] == ["docker.io/library/b:latest"]
    with pytest.raises(NotFound):
        stores.images.remove("a")


def test_gc_12_names_of_another_namespace(stores):
    stores.images.put_all({"a": blob(stores, b"one")})
    other = ImageStore(stores.root.meta, "other")
    assert not other.walk()
    with pytest.raises(NotFound):
        other.get("a")


# -- leases -----------------------------------------------------------------------------------


def test_a_lease_lasts_as_long_as_its_block(stores):
    meta = stores.root.meta
    with leased(meta, "default") as first, leased(meta, "default") as second:
        assert first != second
        with meta.write() as txn:
            record = LEASES.get(txn, "default", first)
            assert record is not None
            assert leases.is_live(meta.owners, record, now())
            ledger.pin(txn, "default", first, blob_node("a"))
            ledger.pin(txn, "default", second, blob_node("b"))
    assert not any(records(stores).values())


def test_a_lease_ends_with_its_block_whatever_happens(stores):
    with pytest.raises(ZeroDivisionError), leased(stores.root.meta, "default"):
        raise ZeroDivisionError
    assert not records(stores)["leases"]


def test_one_lease_takes_nothing_of_another(stores):
    """One ID may begin as another does, or contain it."""
    with stores.root.meta.write() as txn:
        for name in ("a", "ab", "b"):
            ledger.put(txn, "default", Lease(id=name, created=1))
            ledger.pin(txn, "default", name, blob_node("x"))
        ledger.drop(txn, "default", Node(LEASE, "", "a"))
        assert not LEASE_ITEMS.scan(txn, "default", "a")
        assert (
            LEASE_ITEMS.scan(txn, "default", "ab")
            == LEASE_ITEMS.scan(txn, "default", "b")
            == [LeaseItem(kind=CONTENT, backend="", key="x")]
        )


def test_joining(stores):
    with stores.root.meta.write() as txn:
        ledger.pin(txn, "default", "", blob_node("x"))
        with pytest.raises(FailedPrecondition):
            ledger.pin(txn, "default", "ended", blob_node("x"))
        assert not LEASE_ITEMS.any(txn)


def expiring(at: int) -> dict[str, str]:
    return {"containerd.io/gc.expire": rfc3339(at)}


HOLDING = {
    "until a time that cannot be read": ({"labels": {"containerd.io/gc.expire": "soon"}}, None, True),
    "forever": ({}, None, True),
    "until later": ({"labels": expiring(1000)}, None, True),
    "until just now": ({"labels": expiring(100)}, None, False),
    "expired": ({"labels": expiring(99)}, None, False),
    "of this process": ({}, {}, True),
    "of this process, as another pid namespace sees it": ({}, {"namespace": "pid:[1]", "pid": 1}, True),
    "of one that is gone, whatever its pid": ({}, {"id": "0123456789abcdef"}, False),
    "of a record from before owners had locks": ({}, {"id": ""}, False),
    "of this process, expired": ({"labels": expiring(1)}, {}, False),
}


@pytest.mark.parametrize(("about", "changes", "holds"), HOLDING.values(), ids=HOLDING)
def test_which_leases_hold(stores, about, changes, holds):
    owners = stores.root.owners
    owner = None if changes is None else msgspec.structs.replace(owners.me, **changes)
    assert leases.is_live(owners, Lease(id="x", created=1, owner=owner, **about), 100) == holds


# -- lineage ----------------------------------------------------------------------------------


@pytest.fixture
def lineage(stores):
    return MetaStore(stores.root.meta, "overlay", "default")


def commit(lineage, name, parent="", lease=""):
    lineage.create(f"{name} active", Kind.ACTIVE, parent, {}, lease)
    lineage.commit(Committing(Commit(name=name, key=f"{name} active", lease=lease), Usage(1, 1)))
    return lineage.get(name)


def test_a_snapshot_keeps_its_id_and_no_id_comes_back(lineage):
    record, _ = lineage.create("a", Kind.ACTIVE, "", {}, "")
    lineage.commit(Committing(Commit(name="A", key="a", labels={"k": "v"}), Usage(5, 2)))
    committed = lineage.get("A")
    assert (committed.id, committed.kind, committed.size, committed.inodes) == (
        record.id,
        "committed",
        5,
        2,
    )
    assert committed.labels == {"k": "v"}
    lineage.remove("A")
    again, _ = lineage.create("a", Kind.ACTIVE, "", {}, "")
    assert again.id > record.id


def test_what_a_snapshot_stands_on(lineage):
    for name, parent in [("1", ""), ("2", "1"), ("3", "2")]:
        commit(lineage, name, parent)
    record, below = lineage.create("top", Kind.VIEW, "3", {}, "")
    assert [parent.key for parent in below] == ["3", "2", "1"]
    assert lineage.parents("top") == below
    assert record.parent == "3"


def test_gc_03_a_parent_outlives_its_children(lineage):
    commit(lineage, "1")
    commit(lineage, "2", "1")
    lineage.create("a", Kind.ACTIVE, "1", {}, "")
    for child in ("2", "a"):
        with pytest.raises(FailedPrecondition, match="children"):
            lineage.remove("1")
        lineage.remove(child)
    lineage.remove("1")
    assert len(lineage.trash()) == 3


def test_a_parent_given_at_commit(lineage):
    commit(lineage, "1")
    lineage.create("a", Kind.ACTIVE, "", {}, "")
    lineage.commit(Committing(Commit(name="2", key="a", parent="1"), Usage(0, 0)))
    assert lineage.get("2").parent == "1"
    with pytest.raises(FailedPrecondition):
        lineage.remove("1")


def test_children_of_names_that_begin_alike(lineage):
    commit(lineage, "1")
    commit(lineage, "11")
    commit(lineage, "child", "11")
    lineage.remove("1")


def test_m_12_a_snapshot_is_pinned_in_the_step_that_makes_it(stores, lineage):
    with leased(stores.root.meta, "default") as lease:
        commit(lineage, "1", lease=lease)
        with stores.root.meta.read() as txn:
            keys = {found.key for found in LEASE_ITEMS.scan(txn, "default", lease)}
        assert "1" in keys
    for call in (
        lambda: lineage.get("1", lease=lease),
        lambda: lineage.create("a", Kind.ACTIVE, "1", {}, lease),
    ):
        with pytest.raises(FailedPrecondition, match="ended"):
            call()
    assert [record.key for record in lineage.walk()] == ["1"]


def test_trash_is_of_one_backend(stores, lineage):
    other = MetaStore(stores.root.meta, "copy", "default")
    for store in (lineage, other):
        commit(store, "1")
        store.remove("1")
    (number,) = lineage.trash()
    lineage.forget([number])
    assert not lineage.trash()
    assert len(other.trash()) == 1
