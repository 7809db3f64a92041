"""The collector against a naive closure, on random graphs of everything that a store holds."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.failpoints import armed
from engine.gc.collect import Collected, collect
from engine.gc.survey import Places
from engine.kv.schema import BLOBS, INGESTS, LEASES, SNAPSHOTS, Lease, now
from engine.metadata import ledger
from engine.metadata.lineage import Committing, MetaStore
from engine.metadata.nodes import Node, blob_node, snapshot_node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.processes import Owner
from engine.root import Root
from engine.snapshots import Commit, Kind, Usage
from engine.stores import Stores
from engine.times import rfc3339
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST, extents, records
from tests.filesystems import shared_memory

BACKENDS = ["copy", "overlay"]
_DAY = 86_400 * 10**9
_NAMESPACES = itertools.count()

Key = tuple[str, str]
"""("", blob name) or (backend, snapshot name); names are small numbers as text."""


@dataclass
class Graph:
    """A store to be made: who refers to whom, and what holds whom."""

    blobs: list[str]
    snapshots: dict[Key, tuple[str, str, str]]  # to kind, parent, lease ("" for none)
    edges: list[tuple[Key, Key, str]]  # from, to, how the label is written
    roots: list[Key]
    images: list[str]
    leases: dict[str, tuple[str, list[Key]]]  # to how long it lives, and its members
    ingests: dict[str, str]  # to lease


LIVES = ["forever", "a day", "mine", "elsewhere", "expired", "dead"]
LIVE = set(LIVES[:4])

_NAMES = st.sampled_from("0123456")
_FORMS = st.sampled_from([".{}", "/{}", ".l.{}"])
# Written so that they look like references and are none: containerd ignores them as well.
_FALSE_FORMS = st.sampled_from(["s.{}", "x{}", "-{}"])


def _edges(there: list[Key], images: list[str]) -> st.SearchStrategy[tuple[Key, Key, str]]:
    """Return edges of which some lead to nothing, or are none; most begin where something holds."""
    sources = st.sampled_from([*there, *(("", name) for name in images * len(there))])
    nowhere = st.tuples(st.sampled_from(["", *BACKENDS, "none"]), _NAMES)
    targets = st.one_of(st.sampled_from(there), st.sampled_from(there), nowhere)
    return st.tuples(sources, targets, st.one_of(_FORMS, _FORMS, _FALSE_FORMS))


@st.composite
def graphs(draw) -> Graph:
    blobs = draw(st.lists(_NAMES, unique=True, min_size=draw(st.sampled_from([0, 3, 3, 3])), max_size=6))
    lease_names = draw(st.lists(st.sampled_from(["a", "ab", "b"]), unique=True))
    snapshots: dict[Key, tuple[str, str, str]] = {}
    for backend in BACKENDS:
        committed = [""]
        for name in draw(st.lists(_NAMES, unique=True, max_size=6)):
            kind = draw(st.sampled_from(["committed", "committed", "active", "view"]))
            parent = draw(st.sampled_from(committed))
            lease = draw(st.sampled_from(["", *lease_names])) if kind != "committed" else ""
            snapshots[backend, name] = (kind, parent, lease)
            if kind == "committed":
                committed.append(name)
    there = [*(("", name) for name in blobs), *snapshots]
    some = draw(st.sampled_from([0, 1, 1, 1]))
    images = (
        draw(st.lists(st.sampled_from(blobs), unique=True, min_size=some, max_size=2)) if blobs else []
    )
    members = st.lists(st.sampled_from(there), max_size=3) if there else st.just([])
    edge = _edges(there, images) if there else st.nothing()
    return Graph(
        blobs=blobs,
        snapshots=snapshots,
        edges=draw(st.lists(edge, min_size=2, max_size=14)) if there else [],
        roots=draw(st.lists(st.sampled_from(there), max_size=1)) if there else [],
        images=images,
        leases={name: (draw(st.sampled_from(LIVES)), draw(members)) for name in lease_names},
        ingests={
            ref: draw(st.sampled_from(["", *lease_names])) for ref in draw(st.sets(_NAMES, max_size=2))
        },
    )


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    """One root for all examples, each of which has a namespace of its own."""
    with shared_memory() as folder, Root(folder / "root") as root:
        yield Stores(root, "default", AMD64)


# -- making it, through the public stores ------------------------------------------------------


def _bytes(name: str) -> bytes:
    return f"blob {name}".encode()


def node(key: Key) -> Node:
    backend, name = key
    if backend:
        return snapshot_node(backend, name)
    return blob_node(digest_of(_bytes(name)))


def _label(number: int, target: Key, form: str) -> tuple[str, str]:
    base = f"containerd.io/gc.ref.snapshot.{target[0]}" if target[0] else "containerd.io/gc.ref.content"
    # `.l.0` after a backend's name would be another backend's.
    suffix = form.format(number) if not target[0] else f"/{number}"
    if not _is_reference(form) and target[0]:
        base, suffix = "containerd.io/gc.refs.snapshot", f".{target[0]}/{number}"
    return base + suffix, node(target).key


def _is_reference(form: str) -> bool:
    return form[0] in "./"


def labels_of(graph: Graph, key: Key) -> dict[str, str]:
    found = dict(
        _label(number, target, form)
        for number, (source, target, form) in enumerate(graph.edges)
        if source == key
    )
    return {**found, "containerd.io/gc.root": "x"} if key in graph.roots else found


def expiring(at: int) -> dict[str, str]:
    return {"containerd.io/gc.expire": rfc3339(at)}


def lease_record(me: Owner, name: str, life: str) -> Lease:
    return {
        "forever": Lease(id=name, created=1),
        "a day": Lease(id=name, created=1, labels=expiring(now() + _DAY)),
        "mine": Lease(id=name, created=1, owner=me),
        "elsewhere": Lease(id=name, created=1, owner=msgspec.structs.replace(me, namespace="pid:[1]")),
        "expired": Lease(id=name, created=1, labels=expiring(now() - 1)),
        "dead": Lease(id=name, created=1, owner=msgspec.structs.replace(me, id="dead")),
    }[life]


def put(stores: Stores, name: str, labels: dict[str, str]) -> None:
    with stores.content.ingest(f"blob {name}", lease="") as writer:
        writer.write(_bytes(name))
        writer.commit(labels)


def image(stores: Stores, name: str) -> None:
    target = Descriptor(media_type=MANIFEST, digest=digest_of(_bytes(name)), size=6)
    stores.images.put_all({f"image:{name}": target})


def hold(stores: Stores, lease: str, key: Key) -> None:
    if key[0]:
        MetaStore(stores.root.meta, key[0], stores.namespace).get(key[1], lease=lease)
    else:
        stores.content.info(digest_of(_bytes(key[1])), lease=lease)


def build(root_stores: Stores, graph: Graph) -> Stores:
    """Make the graph in a namespace of its own, so that one root serves all examples."""
    stores = Stores(root_stores.root, f"n{next(_NAMESPACES)}", root_stores.platform)
    with stores.root.meta.write() as txn:
        for name, (life, _) in graph.leases.items():
            ledger.put(txn, stores.namespace, lease_record(stores.root.owners.me, name, life))
    for name in graph.blobs:
        put(stores, name, labels_of(graph, ("", name)))
    for (backend, name), (kind, parent, lease) in graph.snapshots.items():
        store = MetaStore(stores.root.meta, backend, stores.namespace)
        about = labels_of(graph, (backend, name))
        if kind == "committed":
            store.create("making", Kind.ACTIVE, parent, {}, "")
            store.commit(Committing(Commit(name=name, key="making", labels=about), Usage(10, 1)))
        else:
            store.create(name, Kind(kind), parent, about, lease)
    for name in graph.images:
        image(stores, name)
    for name, (_, members) in graph.leases.items():
        for key in members:
            hold(stores, name, key)
    for ref, lease in graph.ingests.items():
        with stores.content.ingest(ref, lease=lease) as writer:
            writer.write(b"begun")
        with stores.root.meta.write() as txn:  # its writer died
            ingest = INGESTS.get(txn, stores.namespace, ref)
            ledger.put(
                txn, stores.namespace, msgspec.structs.replace(ingest, owner=Owner("dead"), expires=0)
            )
    return stores


# -- the model ---------------------------------------------------------------------------------


def model(graph: Graph) -> set[Node]:
    """Return what must stay: the closure, computed by asking again until nothing is added."""
    there = {*(("", name) for name in graph.blobs), *graph.snapshots}
    kept = {("", name) for name in graph.images} | set(graph.roots)
    for life, members in graph.leases.values():
        kept.update(members if life in LIVE else [])
    for key, (kind, _, lease) in graph.snapshots.items():
        # Made under a lease it is a member of it; without, someone may be using it.
        if kind != "committed" and (not lease or graph.leases[lease][0] in LIVE):
            kept.add(key)
    while True:
        added = {
            target for source, target, form in graph.edges if source in kept and _is_reference(form)
        }
        added |= {
            (backend, parent)
            for (backend, name), (_, parent, _) in graph.snapshots.items()
            if (backend, name) in kept and parent
        }
        if added & there <= kept:
            return {node(key) for key in kept & there}
        kept |= added & there


def is_led_to(graph: Graph) -> bool:
    """Say whether something stays only because something else leads to it."""
    alone = replace(graph, edges=[])
    return model(alone) < model(graph)


def everything(stores: Stores) -> set[Node]:
    with stores.root.meta.read() as txn:
        found = {blob_node(blob.digest) for blob in BLOBS.scan(txn, stores.namespace)}
        for backend in BACKENDS:
            found |= {
                snapshot_node(backend, record.key)
                for record in SNAPSHOTS.scan(txn, backend, stores.namespace)
            }
    return found


def run(stores: Stores, *, dry_run: bool = False) -> Collected:
    return collect(
        stores.root.meta, Places(namespace=stores.namespace, backends=BACKENDS), dry_run=dry_run
    )


def dropped(collected: Collected) -> set[Node]:
    return {blob_node(digest) for digest in collected.blobs} | set(collected.snapshots)


def orphans(stores: Stores) -> Iterator[str]:
    """Yield every snapshot whose parent is not there."""
    with stores.root.meta.read() as txn:
        for backend in BACKENDS:
            records = {record.key: record for record in SNAPSHOTS.scan(txn, backend, stores.namespace)}
            yield from (key for key, r in records.items() if r.parent and r.parent not in records)


# -- laws --------------------------------------------------------------------------------------


@given(graph=graphs())
@settings(max_examples=150)
def test_gc_01_02_exactly_the_closure_stays(stores, graph):
    made = build(stores, graph)
    before = everything(made)
    collected = run(made)
    kept = model(graph)
    event(f"{'something' if before - kept else 'nothing'} to collect")
    event(f"{'something' if kept else 'nothing'} held")
    event(f"to collect and held through an edge: {bool(before - kept) and is_led_to(graph)}")
    assert everything(made) == kept
    assert dropped(collected) == before - kept
    assert not list(orphans(made))
    for blob in made.content.walk():
        made.content.verify(blob.digest)


@given(graph=graphs())
def test_gc_03_children_before_their_parents(stores, graph):
    made = build(stores, graph)
    order = {found: position for position, found in enumerate(run(made).snapshots)}
    for (backend, name), (_, parent, _) in graph.snapshots.items():
        child, below = (snapshot_node(backend, key) for key in (name, parent))
        assert below not in order or order[child] < order[below]


@given(graph=graphs())
def test_leases_and_ingests_go_with_who_made_them(stores, graph):
    made = build(stores, graph)
    collected = run(made)
    live = {name for name, (life, _) in graph.leases.items() if life in LIVE}
    assert set(collected.leases) == graph.leases.keys() - live
    assert set(collected.ingests) == {ref for ref, lease in graph.ingests.items() if lease not in live}
    with made.root.meta.read() as txn:
        assert {lease.id for lease in LEASES.scan(txn, made.namespace)} == live
        assert all(ingest.lease in live for ingest in INGESTS.scan(txn, made.namespace))


@given(graph=graphs())
def test_a_dry_run_predicts_and_changes_nothing(stores, graph):
    made = build(stores, graph)
    before = records(made)
    predicted = run(made, dry_run=True)
    assert records(made) == before
    assert predicted == run(made)
    sizes = {digest_of(_bytes(name)): len(_bytes(name)) for name in graph.blobs}
    assert predicted.blob_bytes == sum(sizes[digest] for digest in predicted.blobs)


@given(graph=graphs())
def test_gc_08_a_second_collection_finds_nothing(stores, graph):
    made = build(stores, graph)
    run(made)
    before = records(made)
    again = run(made)
    assert (dropped(again), again.ingests, again.leases) == (set(), [], [])
    assert records(made) == before


@given(graph=graphs(), data=st.data())
def test_gc_07_what_is_added_never_costs_anything(stores, graph, data):
    """One more label, name or lease may only make more stay."""
    made = build(stores, graph)
    there = [*(("", name) for name in graph.blobs), *graph.snapshots]
    if not there:
        return
    before = dropped(run(made, dry_run=True))
    source, target = data.draw(st.sampled_from(there)), data.draw(st.sampled_from(there))
    addition = data.draw(st.sampled_from(["label", "root", "lease", "image"]))
    if addition == "image" and graph.blobs:
        image(made, data.draw(st.sampled_from(graph.blobs)))
    elif addition == "lease":
        with made.root.meta.write() as txn:
            ledger.put(txn, made.namespace, Lease(id="new", created=1))
        hold(made, "new", target)
    else:
        label = (
            dict([_label(1000, target, ".{}")])
            if addition == "label"
            else {"containerd.io/gc.root": "x"}
        )
        if source[0]:
            MetaStore(made.root.meta, source[0], made.namespace).update(source[1], label)
        else:
            made.content.update(digest_of(_bytes(source[1])), label)
    assert dropped(run(made, dry_run=True)) <= before
    assert dropped(run(made)) <= before


@given(graph=graphs(), point=st.sampled_from(["gc.swept", "trash.emptied"]), nth=st.integers(1, 3))
def test_gc_09_ms_32_a_fault_changes_nothing_about_the_end(stores, graph, point, nth):
    made = build(stores, graph)
    # The point may lie beyond what this graph reaches.
    with suppress(EngineError), armed(point, "error", nth):
        run(made)
        made.content.cleanup()
    # Whatever the fault left, no record names bytes that are gone.
    assert everything(made) >= model(graph)
    assert not list(orphans(made))
    for blob in made.content.walk():
        made.content.verify(blob.digest)
    run(made)
    made.content.cleanup()
    assert everything(made) == model(graph)
    with made.root.meta.read() as txn:
        kept = {record.number for table in (BLOBS, INGESTS) for record in table.scan(txn)}
    assert {number for number, _ in extents(made)} <= kept


@given(one=graphs(), other=graphs())
def test_gc_12_namespaces_are_apart(stores, one, other):
    """The same names, digests and leases mean nothing next door."""
    first, second = build(stores, one), build(stores, other)
    before = everything(second)
    run(first)
    assert everything(second) == before
    run(second)
    assert (everything(first), everything(second)) == (model(one), model(other))


@pytest.mark.parametrize("life", LIVES)
def test_the_model_knows_which_leases_hold(life):
    """The model itself is no use if it always agrees."""
    graph = Graph(["0"], {}, [], [], [], {"a": (life, [("", "0")])}, {})
    assert bool(model(graph)) == (life in LIVE)
