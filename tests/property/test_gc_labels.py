"""Every label that steers a collection, in random graphs, against the naive closure.

500 graphs in CI; 100,000 with HYPOTHESIS_PROFILE=deep.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from engine.gc.collect import collect
from engine.gc.holding import holder
from engine.gc.survey import Places
from engine.kv.environment import Transaction
from engine.kv.schema import (
    BLOBS,
    HOLDINGS,
    IMAGES,
    INGESTS,
    LAYERS,
    LEASE_ITEMS,
    LEASES,
    MENTIONS,
    SNAPSHOTS,
    Blob,
    Image,
    Ingest,
    Lease,
    Snapshot,
    now,
)
from engine.metadata import ledger
from engine.metadata.nodes import Node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.processes import Owner
from engine.root import Root
from tests.engine.image_files import MANIFEST
from tests.filesystems import shared_memory
from tests.property.naive_closure import Name, closure, world_of

_GRAPHS = 100_000 if settings.get_current_profile_name() == "deep" else 500
_BACKENDS = ("copy", "overlay")
_SPACE = "default"
_DEAD = Owner(id="dead", pid=1, namespace="1")
_DAY = 86_400 * 10**9

_BLOBS = [digest_of(name.encode()) for name in "0123"]
_IMAGES = [f"example.org/{name}:1" for name in "ab"]
_KEYS = ["s", "t", "u"]

Labels = Mapping[str, str]


# -- labels -------------------------------------------------------------------------------------

_PAST = ["2001-01-01T00:00:00Z", "1999-12-31T23:59:59.999999999+14:00", "2001-02-03t04:05:06z"]
_FUTURE = ["2999-01-01T00:00:00Z", "2999-01-01T00:00:00.5-01:00"]
_NO_TIME = [
    "",
    "never",
    "2001-01-01",
    "2001-13-01T00:00:00Z",
    "2001-01-01T00:00:00",
    "1",
    "²001-01-01T00:00:00Z",
]
_TIMES = st.sampled_from([*_PAST, *_PAST, *_FUTURE, *_NO_TIME])
_BASES = st.sampled_from(
    [
        *("ref.content", "ref.image", "ref.snapshot.copy", "ref.snapshot.overlay") * 3,
        *("bref.content", "bref.image", "bref.snapshot.copy", "bref.snapshot.overlay") * 2,
        *(
            "ref.snapshot.",
            "ref.snapshot",
            "ref.stream",
            "ref.",
            "bref.container",
            "bref.",
            "ref.contents",
        ),
    ]
)
_SUFFIXES = st.sampled_from(["", ".x", "/x", ".l.0", "/", ".", "x", "-x", " ", "\n", "/x\ny"])
_TARGETS = st.sampled_from([*_BLOBS, *_IMAGES, *_KEYS, *_KEYS, "nowhere", ""])
_CONDITIONS = st.sampled_from(
    [
        "usedat<1h",
        "usedat>1h",
        "usedat>1h30m",
        "usedat<",
        "usedat=1h",
        "usedat<soon",
        "size<3",
        "",
        "usedat",
    ]
)


def _one(
    key: st.SearchStrategy[str], value: st.SearchStrategy[str]
) -> st.SearchStrategy[tuple[str, str]]:
    return st.tuples(key.map("containerd.io/gc.{}".format), value)


_EDGE = _one(st.tuples(_BASES, _SUFFIXES).map("".join), _TARGETS)
_CONDITIONAL = _one(
    st.tuples(st.sampled_from(["copy", "overlay", "none"]), st.sampled_from(["", "/x", ".x", "/1"])).map(
        lambda pair: f"cond.snapshot.{pair[0]}{pair[1]}"
    ),
    st.tuples(
        st.lists(_CONDITIONS, min_size=1, max_size=2).map(",".join), st.sampled_from("||| "), _TARGETS
    ).map("".join),
)
_ADDING = [
    _EDGE,
    _EDGE,
    _EDGE,
    _CONDITIONAL,
    _one(st.sampled_from(["root", "root", "rooted", "root/x", "roo"]), st.sampled_from(["", "x"])),
    _one(st.text(max_size=12), st.one_of(_TARGETS, st.text(max_size=8))),
]
_LABEL = st.one_of(
    *_ADDING,
    *_ADDING,
    _one(st.just("expire"), _TIMES),
    _one(st.sampled_from(["flat", "flatter"]), st.sampled_from(["", "x"])),
    _one(st.just("cond.value-usedat"), _TIMES),
)
_LABELS = st.lists(_LABEL, max_size=3).map(dict)


# -- graphs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Objects of a namespace, by what their records need."""

    blobs: dict[str, Labels]
    snapshots: dict[tuple[str, str], tuple[str, str, str, Labels]]  # kind, parent, lease
    images: dict[str, tuple[str, Labels]]
    leases: dict[str, tuple[str, list[Name], Labels]]
    ingests: dict[str, tuple[str, str | None]]

    def names(self) -> list[Name]:
        return [
            *(("content", "", digest) for digest in self.blobs),
            *(("snapshots", *name) for name in self.snapshots),
            *(("images", "", name) for name in self.images),
            *(("leases", "", name) for name in self.leases),
            *(("ingests", "", ref) for ref in self.ingests),
        ]

    def labels(self, name: Name) -> Labels:
        kind, backend, key = name
        match kind:
            case "content":
                return self.blobs[key]
            case "snapshots":
                return self.snapshots[backend, key][3]
            case "images":
                return self.images[key][1]
            case "leases":
                return self.leases[key][2]
        return {}


@st.composite
def graphs(draw) -> Graph:
    blobs = draw(st.dictionaries(st.sampled_from(_BLOBS), _LABELS, max_size=4))
    lease_names = draw(st.sets(st.sampled_from("LM")))
    snapshots: dict[tuple[str, str], tuple[str, str, str, Labels]] = {}
    for backend in _BACKENDS:
        below = [""]
        for key in draw(st.lists(st.sampled_from(_KEYS), unique=True, max_size=3)):
            kind = draw(st.sampled_from(["committed", "committed", "committed", "active", "view"]))
            lease = draw(st.sampled_from(["", "L", *lease_names])) if kind != "committed" else ""
            parent = draw(st.sampled_from(below))
            snapshots[backend, key] = (kind, parent, lease, draw(_LABELS))
            if kind == "committed":
                below.append(key)
    images = draw(
        st.dictionaries(
            st.sampled_from(_IMAGES), st.tuples(st.sampled_from(_BLOBS), _LABELS), max_size=2
        )
    )
    there: list[Name] = [
        *(("content", "", one) for one in (*blobs, _BLOBS[0])),
        *(("snapshots", *one) for one in snapshots),
        *(("images", "", one) for one in images),
    ]
    members = st.lists(st.sampled_from(there), max_size=3, unique=True)
    lives = st.sampled_from(["for ever", "mine", "dead"])
    leases = {name: (draw(lives), draw(members), draw(_LABELS)) for name in lease_names}
    expected = st.one_of(st.none(), st.sampled_from(_BLOBS))
    ingests = draw(
        st.dictionaries(
            st.just("r"), st.tuples(st.sampled_from(["mine", "dead", "dead, a day"]), expected)
        )
    )
    return Graph(blobs, snapshots, images, leases, ingests)


_TABLES = (BLOBS, SNAPSHOTS, IMAGES, LEASES, LEASE_ITEMS, INGESTS, MENTIONS, HOLDINGS, LAYERS)


def put(txn: Transaction, graph: Graph, me: Owner) -> None:
    """Write a graph over whatever there is."""
    for table in _TABLES:
        table.clear(txn)
    for name, (life, members, labels) in graph.leases.items():
        owner = {"for ever": None, "mine": me, "dead": _DEAD}[life]
        ledger.put(txn, _SPACE, Lease(id=name, created=1, owner=owner, labels=dict(labels)))
        for member in members:
            ledger.pin(txn, _SPACE, name, Node(*member))
    for number, (digest, labels) in enumerate(graph.blobs.items()):
        blob = Blob(digest=digest, number=number, size=1, created=1, updated=1, labels=dict(labels))
        ledger.put(txn, _SPACE, blob)
    for number, ((backend, key), found) in enumerate(graph.snapshots.items()):
        kind, parent, lease, labels = found
        snapshot = Snapshot(
            key=key,
            id=number,
            kind=kind,
            parent=parent,
            created=1,
            updated=1,
            lease=lease,
            labels=dict(labels),
        )
        ledger.put_snapshot(txn, backend, _SPACE, snapshot)
    for name, (target, labels) in graph.images.items():
        descriptor = Descriptor(media_type=MANIFEST, digest=target, size=1)
        image = Image(name=name, target=descriptor, created=1, updated=1, labels=dict(labels))
        ledger.put(txn, _SPACE, image)
    for ref, (life, expected) in graph.ingests.items():
        ingest = Ingest(
            ref=ref,
            number=99,
            total=None,
            expected=expected,
            owner=me if life == "mine" else _DEAD,
            lease="",
            started=1,
            expires=now() + _DAY if life.endswith("day") else 1,
        )
        ledger.put(txn, _SPACE, ingest)


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with shared_memory() as folder, Root(folder / "root") as opened:
        yield opened


def there(root: Root) -> set[Name]:
    with root.meta.read() as txn:
        return set(world_of(txn, _SPACE, _BACKENDS, root.owners.me.id, now()))


def run(root: Root, *, dry_run: bool = False) -> set[Name]:
    """Collect and return what went, as told."""
    places = Places(namespace=_SPACE, backends=_BACKENDS)
    found = collect(root.meta, places, dry_run=dry_run)
    assert not found.errors
    return {
        *(("content", "", digest) for digest in found.blobs),
        *(("images", "", name) for name in found.images),
        *(("leases", "", name) for name in found.leases),
        *(("ingests", "", ref) for ref in found.ingests),
        *((node.kind, node.backend, node.key) for node in found.snapshots),
    }


def edges(txn: Transaction) -> list[list[tuple[bytes, bytes]]]:
    """Return what is noted of who mentions what, and of whose bytes a digest has."""
    found = []
    for table in (MENTIONS, HOLDINGS, LAYERS):
        with txn.raw.cursor(db=txn.databases[table.name]) as cursor:
            found.append([(bytes(key), bytes(value)) for key, value in cursor])
    return found


_USED = {"containerd.io/gc.cond.value-usedat": ""}
_ONE = {("copy", "s"): ("committed", "", "", _USED)}
_WHILE_USED = {"containerd.io/gc.cond.snapshot.copy": "usedat<1h|s", "containerd.io/gc.root": ""}
_GONE = {"containerd.io/gc.expire": _PAST[0], "containerd.io/gc.bref.container": "c"}


@given(graph=graphs())
@example(graph=Graph({_BLOBS[0]: {}}, {}, {_IMAGES[0]: (_BLOBS[0], _GONE)}, {}, {}))
@example(
    graph=Graph({_BLOBS[0]: _WHILE_USED}, {("copy", "s"): ("committed", "", "", _USED)}, {}, {}, {})
)
@settings(max_examples=_GRAPHS)
def test_p1_gc_01_02_13_19_exactly_the_closure_stays(root, graph):
    with root.meta.write() as txn:
        put(txn, graph, root.owners.me)
    with root.meta.read() as txn:
        world = world_of(txn, _SPACE, _BACKENDS, root.owners.me.id, now())
        kept = closure(world, now() / 1e9)
        for name in kept:
            assert holder(root.owners, txn, _SPACE, Node(*name)), f"nobody is said to hold {name}"
    event(f"something kept by another: {any(world[name].labels for name in kept)}")
    event(f"something to collect: {kept < world.keys()}")
    gone = run(root)
    assert there(root) == kept
    assert gone == world.keys() - kept
    with root.meta.write() as txn:
        noted = edges(txn)
        ledger.rebuild(txn)
        assert edges(txn) == noted


@given(graph=graphs(), data=st.data())
def test_gc_07_one_more_label_costs_nothing(root, graph, data):
    with root.meta.write() as txn:
        put(txn, graph, root.owners.me)
    before = run(root, dry_run=True)
    names = [name for name in graph.names() if name[0] != "ingests"]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    key, value = data.draw(st.one_of(*_ADDING))
    if key in graph.labels(name) or key.endswith(("gc.flat", "gc.expire", "-usedat")):
        return
    with root.meta.write() as txn:
        record = ledger.get(txn, _SPACE, Node(*name))
        changed = msgspec.structs.replace(record, labels={**record.labels, key: value})
        if isinstance(changed, Snapshot):
            ledger.put_snapshot(txn, name[1], _SPACE, changed)
        else:
            ledger.put(txn, _SPACE, changed)
    assert run(root, dry_run=True) <= before
    assert run(root) <= before
