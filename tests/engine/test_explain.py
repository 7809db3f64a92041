"""What is said of garbage, and of who holds the rest: each kind of holder, and sums against a model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import NotFound
from engine.explaining import explain_named, explain_store
from engine.gc.explain import Keeper, Link, explain, explain_node
from engine.gc.survey import Places
from engine.kv.schema import BLOBS, IMAGES, LEASES, Blob, Image, Ingest, Lease, Snapshot, now
from engine.metadata import ledger
from engine.metadata.nodes import IMAGE, INGEST, LEASE, Node, blob_node, snapshot_node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.times import rfc3339
from tests.engine.image_files import MANIFEST

PLACES = Places(namespace="default", backends=["copy"])
EXPIRE = "containerd.io/gc.expire"
HOUR = 3600 * 10**9


def digest(name):
    return str(digest_of(name.encode()))


def write(stores, *records):
    with stores.root.meta.write() as txn:
        for record in records:
            if isinstance(record, Snapshot):
                ledger.put_snapshot(txn, "copy", "default", record)
            else:
                ledger.put(txn, "default", record)


def blob(name, size, *holds, **labels):
    about = {f"containerd.io/gc.ref.content.{n}": digest(held) for n, held in enumerate(holds)}
    return Blob(digest=digest(name), number=1, size=size, created=1, updated=1, labels=about | labels)


def image(name, target, **labels):
    about = Descriptor(media_type=MANIFEST, digest=digest(target), size=1)
    return Image(name=name, target=about, created=1, updated=1, labels=labels)


def snapshot(key, kind="committed", parent="", size=0, **labels):
    return Snapshot(
        key=key, id=1, kind=kind, parent=parent, created=1, updated=1, size=size, labels=labels
    )


def pin(stores, lease, *nodes):
    with stores.root.meta.write() as txn:
        for node in nodes:
            ledger.pin(txn, "default", lease, node)


def held(stores, places=PLACES):
    found = explain(stores.root.meta, places).held
    return {one.holder: (one.objects, one.alone, one.shared) for one in found}


def test_images_alone_and_together(stores):
    write(stores, blob("base", 100), blob("a", 10, "base"), blob("b", 20, "base"), blob("gone", 7))
    write(stores, image("one", "a"), image("two", "b"), image("again", "b"))
    explained = explain(stores.root.meta, PLACES)
    assert [(one.node, one.bytes) for one in explained.garbage] == [(blob_node(digest("gone")), 7)]
    assert held(stores) == {
        Keeper(Node(IMAGE, "", "one"), ""): (2, 10, 100),
        Keeper(Node(IMAGE, "", "two"), ""): (2, 0, 120),
        Keeper(Node(IMAGE, "", "again"), ""): (2, 0, 120),
    }
    assert [one.alone for one in explained.held] == [10, 0, 0]


def test_leases_with_their_end_or_owner(stores):
    at = now() + HOUR
    write(stores, blob("below", 5), blob("a", 1, "below"), blob("b", 2, "below"), blob("c", 4))
    write(stores, Lease(id="end", created=1, labels={EXPIRE: rfc3339(at)}))
    write(stores, Lease(id="flat", created=1, labels={"containerd.io/gc.flat": ""}))
    write(stores, Lease(id="mine", created=1, owner=stores.root.meta.owners.me))
    write(stores, Lease(id="over", created=1, labels={EXPIRE: rfc3339(1)}))
    pin(stores, "end", blob_node(digest("a")))
    pin(stores, "flat", blob_node(digest("b")))
    pin(stores, "mine", blob_node(digest("a")))
    pin(stores, "over", blob_node(digest("c")))
    me = str(stores.root.meta.owners.me)
    assert held(stores) == {
        Keeper(Node(LEASE, "", "end"), f"expires {rfc3339(at)}"): (2, 0, 6),
        Keeper(Node(LEASE, "", "flat"), ""): (1, 2, 0),
        Keeper(Node(LEASE, "", "mine"), me): (2, 0, 6),
    }
    garbage = {one.node for one in explain(stores.root.meta, PLACES).garbage}
    assert garbage == {Node(LEASE, "", "over"), blob_node(digest("c"))}


def test_one_object_is_explained_by_the_clock_that_a_collection_goes_by(stores):
    write(stores, blob("a", 1), image("name", "a", **{EXPIRE: rfc3339(1)}))
    for node in (blob_node(digest("a")), Node(IMAGE, "", "name")):
        kept = explain_node(stores.root.meta, "default", node)
        assert (kept.holder, kept.chain) == (None, [])
    about = {EXPIRE: rfc3339(1), "containerd.io/gc.bref.unknown": "x"}
    write(stores, image("bound", "a", **about))
    assert explain_node(stores.root.meta, "default", Node(IMAGE, "", "bound")).holder is not None


def test_what_is_a_root_only_by_a_lease_is_no_holder_itself(stores):
    write(stores, blob("a", 1), image("name", "a", **{EXPIRE: rfc3339(1)}))
    write(stores, Lease(id="x", created=1))
    pin(stores, "x", Node(IMAGE, "", "name"))
    assert held(stores) == {Keeper(Node(LEASE, "", "x"), ""): (1, 1, 0)}


def test_labels_snapshots_and_ingests(stores):
    write(stores, blob("root", 3, **{"containerd.io/gc.root.why": "x"}))
    write(stores, snapshot("base", size=50), snapshot("work", "active", "base"))
    write(stores, snapshot("kept", size=9, **{"containerd.io/gc.root": "x"}))
    owner = stores.root.meta.owners.me
    write(
        stores,
        Ingest(ref="r", number=2, total=None, expected=digest("root"), owner=owner, lease="", started=1),
    )
    assert held(stores) == {
        Keeper(blob_node(digest("root")), "label containerd.io/gc.root.why"): (1, 0, 3),
        Keeper(snapshot_node("copy", "work"), "in use"): (2, 50, 0),
        Keeper(snapshot_node("copy", "kept"), "label containerd.io/gc.root"): (1, 9, 0),
        Keeper(Node(INGEST, "", "r"), "being written"): (1, 0, 3),
    }


def test_a_backend_that_cannot_be_used(stores):
    write(stores, snapshot("base", size=50))
    places = Places(namespace="default", backends=[])
    holder = Keeper(snapshot_node("copy", "base"), "copy cannot be used")
    assert held(stores, places) == {holder: (1, 50, 0)}


def test_the_way_to_one_object(stores):
    write(stores, blob("layer", 100), blob("manifest", 10, "layer"), blob("loose", 1))
    write(stores, image("one", "manifest"))
    kept = explain_node(stores.root.meta, "default", blob_node(digest("layer")))
    way = [Node(IMAGE, "", "one"), blob_node(digest("manifest")), blob_node(digest("layer"))]
    assert (kept.holder, [link.node for link in kept.chain]) == (Keeper(way[0], ""), way)
    assert [link.role for link in kept.chain] == ["", "manifest", ""]
    loose = explain_node(stores.root.meta, "default", blob_node(digest("loose")))
    assert (loose.holder, loose.chain) == (None, [])


def test_the_shortest_way_is_told_and_circles_end(stores):
    write(stores, blob("a", 1, "b"), blob("b", 1, "a"))
    assert not explain_node(stores.root.meta, "default", blob_node(digest("a"))).chain
    write(stores, blob("top", 1, "b"), image("far", "top"), image("near", "b"))
    kept = explain_node(stores.root.meta, "default", blob_node(digest("b")))
    assert kept.chain == [Link(Node(IMAGE, "", "near")), Link(blob_node(digest("b")), "manifest")]


@pytest.mark.root
def test_names_of_people_mean_all_that_is_called_so(stores):
    """The first layer of an image that is not packed is a blob and a snapshot of one name."""
    full = "docker.io/library/one:latest"
    write(stores, blob("layer", 100), image(full, "layer"))
    backend = stores.snapshotter("copy")
    backend.prepare("work")
    write(stores, snapshot(digest("layer"), size=9))
    nodes = [blob_node(digest("layer")), snapshot_node("copy", digest("layer"))]
    for text in (digest("layer"), digest("layer")[:20], digest("layer")[7:27]):
        assert [kept.node for kept in explain_named(stores, text)] == nodes
    assert [kept.node for kept in explain_named(stores, "one")] == [Node(IMAGE, "", full)]
    assert [kept.node for kept in explain_named(stores, "work")] == [snapshot_node("copy", "work")]
    with pytest.raises(NotFound, match="no image, blob or snapshot other"):
        explain_named(stores, "other")
    assert len(explain_store(stores).held) == 2


_NAMES = "abcdef"


@settings(max_examples=settings().max_examples // 2)
@given(
    edges=st.sets(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_NAMES)), max_size=8),
    images=st.sets(st.sampled_from(_NAMES), max_size=3),
    leases=st.lists(st.sets(st.sampled_from(_NAMES), max_size=2), max_size=2),
)
def test_sums_against_a_naive_closure(stores, edges, images, leases):
    with stores.root.meta.write() as txn:
        for table in (BLOBS, IMAGES, LEASES, ledger.LEASE_ITEMS):
            table.clear(txn)
        ledger.rebuild(txn)
    size = {name: 1 << number for number, name in enumerate(_NAMES)}
    for name in _NAMES:
        write(stores, blob(name, size[name], *sorted(to for at, to in edges if at == name)))
    write(stores, *(image(name, name) for name in images))
    for number, members in enumerate(leases):
        write(stores, Lease(id=f"lease {number}", created=1))
        pin(stores, f"lease {number}", *(blob_node(digest(name)) for name in members))

    def closure(names):
        more = names | {to for at, to in edges if at in names}
        return names if more == names else closure(more)

    expected = {Node(IMAGE, "", name): closure({name}) for name in images}
    expected |= {Node(LEASE, "", f"lease {n}"): closure(held) for n, held in enumerate(leases)}
    explained = explain(stores.root.meta, PLACES)
    garbage = set(_NAMES).difference(*expected.values())
    assert sum(one.bytes for one in explained.garbage) == sum(size[name] for name in garbage)
    assert {one.holder.node for one in explained.held} == expected.keys()
    for one in explained.held:
        mine = expected[one.holder.node]
        others = (names for node, names in expected.items() if node != one.holder.node)
        shared = mine.intersection(set().union(*others))
        assert one.objects == len(mine)
        assert one.shared == sum(size[name] for name in shared)
        assert one.alone == sum(size[name] for name in mine - shared)
