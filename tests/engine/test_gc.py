"""The collector rule by rule: what holds, what does not, faults in the middle, other processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine import limits, plugins
from engine.errors import EngineError, FailedPrecondition, Unavailable
from engine.failpoints import armed
from engine.gc import collect as collecting
from engine.gc import survey
from engine.gc.collect import collect
from engine.gc.mark import by_level, holders_first, reachable
from engine.gc.survey import Places
from engine.kv import keys
from engine.kv.environment import Environment
from engine.kv.schema import (
    BLOBS,
    EXTENT,
    IMAGES,
    INGESTS,
    LEASE_ITEMS,
    LEASES,
    MARKS,
    SNAPSHOTS,
    TRASH,
    Lease,
    Snapshot,
    now,
)
from engine.metadata import ledger, marks
from engine.metadata.leases import leased
from engine.metadata.lineage import MetaStore
from engine.metadata.nodes import CONTENT as CONTENT_KIND
from engine.metadata.nodes import Node, snapshot_node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.processes import Owner, Owners
from engine.recovery import recover
from engine.snapshots import Commit, Kind, Plugin, Probe
from engine.stores import Stores
from engine.times import rfc3339
from tests.engine.image_files import MANIFEST, Files, extents, import_image, records, state

# A snapshot's tree belongs to root.
pytestmark = [pytest.mark.root, pytest.mark.usefixtures("all_in_extents")]

ROOT = {"containerd.io/gc.root": "2020-01-01T00:00:00Z"}
CONTENT = "containerd.io/gc.ref.content"
SNAPSHOT = "containerd.io/gc.ref.snapshot"


def put(stores, data: bytes, labels=None, lease=""):
    with stores.content.ingest(f"put {digest_of(data)}", lease=lease) as writer:
        writer.write(data)
        return writer.commit(labels).digest


def name(stores, image, digest):
    size = stores.content.info(digest).size
    stores.images.put_all({image: Descriptor(media_type=MANIFEST, digest=digest, size=size)})


def blobs(stores):
    return {blob.digest for blob in stores.content.walk()}


def expiring(at):
    return {"containerd.io/gc.expire": rfc3339(at)}


def hold(stores, lease: Lease, *digests):
    with stores.root.meta.write() as txn:
        ledger.put(txn, "default", lease)
    for digest in digests:
        stores.content.info(digest, lease=lease.id)


# -- what holds a blob ------------------------------------------------------------------------

HELD = {
    f"{CONTENT}": True,
    f"{CONTENT}.config": True,
    f"{CONTENT}.l.0": True,
    f"{CONTENT}/anything": True,
    f"{CONTENT}s": False,
    "containerd.io/gc.ref.contents.0": False,
    "io.containerd.gc.ref.content": False,
    f"{SNAPSHOT}.overlay": False,
}


@pytest.mark.parametrize(("key", "holds"), HELD.items())
def test_labels_that_hold_content(stores, key, holds):
    below = put(stores, b"below")
    name(stores, "a", put(stores, b"above", {key: below}))
    stores.collect()
    assert (below in blobs(stores)) == holds


@pytest.mark.parametrize(
    "key", ["containerd.io/gc.root", "containerd.io/gc.root.why", "containerd.io/gc.rootx"]
)
def test_gc_13_a_root_label_holds_whatever_its_value(stores, key):
    """Its name is matched as containerd does, by its beginning: in doubt the object stays."""
    root = put(stores, b"root", {key: "no date"})
    stores.collect()
    assert blobs(stores) == {root}


def test_gc_13_a_label_with_nonsense_holds_its_own_object_no_less(stores):
    held = put(stores, b"x", {f"{CONTENT}.0": "not a digest", f"{SNAPSHOT}.": "", f"{SNAPSHOT}.x": "?"})
    name(stores, "a", held)
    stores.collect()
    assert blobs(stores) == {held}


def test_an_image_holds_as_long_as_one_name_is_left(stores):
    held = put(stores, b"x")
    name(stores, "a", held)
    name(stores, "b", held)
    for image, left in (("a", {held}), ("b", set())):
        stores.images.remove(image)
        stores.collect()
        assert blobs(stores) == left


def test_gc_05_a_lease_holds_what_is_found_and_what_that_refers_to(stores):
    below = put(stores, b"below")
    above = put(stores, b"above", {CONTENT: below})
    with leased(stores.root.meta, "default") as lease:
        stores.content.info(above, lease=lease)
        made = put(stores, b"made", lease=lease)
        stores.collect()
        assert blobs(stores) == {above, below, made}
    stores.collect()
    assert not blobs(stores)


_DAY = 86_400 * 10**9

LEASES_HELD = {
    "without end": (lambda _: Lease(id="x", created=1), True),
    "for a day": (lambda _: Lease(id="x", created=1, labels=expiring(now() + _DAY)), True),
    "expired": (lambda _: Lease(id="x", created=1, labels=expiring(now() - 1)), False),
    "of this process": (lambda owners: Lease(id="x", created=1, owner=owners.me), True),
    "of a dead one": (lambda _: Lease(id="x", created=1, owner=Owner("dead", os.getpid())), False),
}


@pytest.mark.parametrize(("make", "holds"), LEASES_HELD.values(), ids=LEASES_HELD)
def test_gc_05_which_leases_hold(stores, make, holds):
    digest = put(stores, b"x")
    hold(stores, make(stores.root.owners), digest)
    collected = stores.collect()
    assert (digest in blobs(stores)) == holds
    assert collected.leases == ([] if holds else ["x"])
    # GC-14: a lease that holds is never taken away.
    assert bool(records(stores)["leases"]) == holds


def test_gc_14_a_lease_that_is_left_takes_its_members_list_along(stores):
    hold(stores, Lease(id="x", created=1, labels=expiring(1)), put(stores, b"x"))
    stores.collect()
    assert not any(records(stores).values())


def test_gc_06_an_ingest_lives_with_its_lease(stores):
    with leased(stores.root.meta, "default") as lease:
        writer = stores.content.ingest("x", lease=lease)
        writer.write(bytes(EXTENT + 1))
        assert stores.collect().ingests == []
        writer.commit()
        assert len(blobs(stores)) == 1
    stores.collect()
    assert not any(records(stores).values())
    assert not extents(stores)


def died(stores, ref, **about):
    """Let the writer of an ingest have died."""
    with stores.root.meta.write() as txn:
        ingest = INGESTS.get(txn, "default", ref)
        ledger.put(txn, "default", msgspec.structs.replace(ingest, owner=Owner("dead"), **about))


@pytest.mark.parametrize("expires", [0, 1, 1 << 62])
def test_gc_06_an_ingest_whose_writer_died_lives_until_it_expires(stores, expires):
    writer = stores.content.ingest("x", lease="")
    writer.write(bytes(EXTENT + 1))
    assert stores.collect().ingests == []
    writer.close()  # or else it holds its bytes
    died(stores, "x", expires=expires)
    is_over = expires < now()
    assert stores.collect().ingests == ["x"] * is_over
    assert bool(extents(stores)) != is_over


def test_gc_12_another_namespace_is_left_alone(stores):
    other = Stores(stores.root, "other", stores.platform)
    put(other, b"theirs")
    put(stores, b"ours")
    before = records(other)["blobs"]
    assert stores.collect().blobs == [digest_of(b"ours")]
    assert [entry for entry in before if entry in records(stores)["blobs"]] == records(stores)["blobs"]
    assert other.content.verify(digest_of(b"theirs"))


def test_cycles_and_edges_to_nothing(stores):
    one, two = digest_of(b"one"), digest_of(b"two")
    put(stores, b"one", {f"{CONTENT}.0": two, f"{CONTENT}.1": digest_of(b"absent")})
    put(stores, b"two", {f"{CONTENT}.0": one, f"{CONTENT}.1": two, f"{SNAPSHOT}.none": "absent"})
    name(stores, "a", one)
    stores.collect()
    assert blobs(stores) == {one, two}
    stores.images.remove("a")
    stores.collect()
    assert not blobs(stores)


def damage(stores, table, *key):
    with stores.root.meta.write() as txn:
        txn.raw.put(keys.encode(key), b"\xc1", db=txn.databases[table.name])


@pytest.mark.parametrize(
    ("table", "key"),
    [
        (IMAGES, ("default", "docker.io/library/a:latest")),
        (BLOBS, ("default", digest_of(b"x"))),
        (SNAPSHOTS, ("copy", "default", "1")),
        (LEASES, ("default", "broken")),
    ],
)
def test_gc_16_what_a_damaged_record_may_hold_stays(stores, table, key):
    """Taking it for absent would delete all that it holds. Ingests and leases go all the same."""
    chain(stores, "1", "2")
    name(stores, "a", put(stores, b"x"))
    put(stores, b"garbage")
    hold(stores, Lease(id="expired", created=1, labels=expiring(1)))
    damage(stores, table, *key)
    before = state(stores)
    assert len(stores.collect(dry_run=True).errors) == 1
    assert state(stores) == before
    collected = stores.collect()
    assert (collected.blobs, collected.snapshots, collected.leases) == ([], [], ["expired"])
    assert key[-1] in collected.errors[0]
    assert "cannot be read" in collected.errors[0]
    if table is IMAGES:  # the way out
        assert [image.name for image in stores.images.damaged()] == [key[-1]]
        stores.images.remove("a")
        assert set(stores.collect().blobs) == {digest_of(b"x"), digest_of(b"garbage")}


def test_a_member_that_cannot_be_read_does_not_keep_an_ended_lease(stores):
    found = put(stores, b"member")
    for lease in ("expired", "removed"):
        hold(stores, Lease(id=lease, created=1, labels=expiring(1)), found)
        damage(stores, LEASE_ITEMS, "default", lease, CONTENT_KIND, "", found)
    stores.leases.delete("removed")
    collected = stores.collect()
    assert (collected.leases, collected.errors) == (["expired"], [])
    assert collected.blobs == [found]
    assert not records(stores)["lease_items"]


def test_the_members_of_a_lease_go_in_short_transactions(stores, monkeypatch):
    """Without its record they hold nothing: what a crash leaves of them the next collection takes."""
    monkeypatch.setattr(ledger, "_LET_GO", 2)
    held = [put(stores, b"%d" % number) for number in range(7)]

    def dropped(lease):
        hold(stores, Lease(id=lease, created=1), *held)
        with stores.root.meta.write() as txn:
            ledger.drop(txn, "default", Node("leases", "", lease))
        assert len(records(stores)["lease_items"]) == 5

    dropped("named")
    stores.leases.create("named")  # anew, with nothing of the old one
    assert stores.leases.members("named") == []
    hold(stores, Lease(id="removed", created=1), *held)
    stores.leases.delete("removed", "named")
    with leased(stores.root.meta, "default") as lease:
        hold(stores, Lease(id=lease, created=1), *held)
    assert not records(stores)["lease_items"]
    assert not records(stores)["mentions"]
    dropped("crashed")
    assert sorted(stores.collect().blobs) == sorted(held)
    assert not any(records(stores).values())


def test_snapshots_of_a_backend_that_cannot_be_loaded_stay(stores, monkeypatch):
    held = put(stores, b"x")
    chain(stores, "1", "2").update("2", {f"{CONTENT}.0": held})
    put(stores, b"garbage")
    MetaStore(stores.root.meta, "gone", "default").create("work", Kind.ACTIVE, "", {}, "")
    (stores.root.snapshots / "gone").mkdir()

    def create(*_):
        raise ImportError("no module named zfs")

    broken = plugins._plugins() | {"copy": Plugin("copy", create, lambda _: Probe(True, True))}
    monkeypatch.setattr(plugins, "_plugins", lambda: broken)
    one = plugins._plugin
    monkeypatch.setattr(plugins, "_plugin", lambda name: broken.get(name) or one(name))
    opened = Stores(stores.root, "default", stores.platform)
    assert "no module named zfs" in opened.broken["copy"]
    assert "no snapshotter 'gone'" in opened.broken["gone"]
    collected = opened.collect()
    assert (collected.blobs, collected.snapshots) == ([digest_of(b"garbage")], [])
    assert len(collected.errors) == 2
    assert blobs(stores) == {held}


def test_what_a_backend_holds_that_is_first_used_while_a_collection_waits_stays(stores, monkeypatch):
    """Which backends there are was seen before another collection ended, minutes later maybe."""
    held, begin = put(stores, b"held"), marks.begin
    waiting = []

    def begins(txn, namespace, owner):
        if not waiting:
            waiting.append(owner)
            record = Snapshot(
                key="new", id=99, kind="committed", parent="", created=1, updated=1, labels=ROOT
            )
            held_by = msgspec.structs.replace(record, labels={**ROOT, f"{CONTENT}.0": held})
            ledger.put_snapshot(txn, "copy", "default", held_by)
            loose = msgspec.structs.replace(record, key="loose", id=98, labels={})
            ledger.put_snapshot(txn, "copy", "default", loose)
            return False
        return begin(txn, namespace, owner)

    assert stores.snapshotters() == []
    monkeypatch.setattr(marks, "begin", begins)
    collected = stores.collect()
    assert (collected.blobs, collected.snapshots) == ([], [])
    assert blobs(stores) == {held}


@pytest.mark.parametrize("name", [b"\xff", b"a\nb", b"lost+found", b"zfs"])
def test_a_folder_that_is_no_backend_stops_nothing(stores, name):
    chain(stores, "1")
    put(stores, b"garbage")
    os.mkdir(os.fsencode(stores.root.snapshots) + b"/" + name)
    (stores.root.snapshots / "a file").touch()
    assert [backend.name for backend in stores.snapshotters()] == ["copy"]
    assert stores.find_snapshot("1")[0].name == "copy"
    for dry_run in (True, False):
        collected = stores.collect(dry_run=dry_run)
        assert collected.blobs == [digest_of(b"garbage")]
        assert [node.key for node in collected.snapshots] == ["1"]
        assert len(collected.errors) == os.fsdecode(name).isprintable()


def test_dead_readers_are_looked_for_before_a_collection(stores, monkeypatch):
    asked = []
    monkeypatch.setattr(Environment, "check_readers", lambda file: asked.append((file,)))
    stores.collect(dry_run=True)
    assert asked == []
    stores.collect()
    assert asked == [(stores.root.meta,), (stores.root.blobs,)]


# -- snapshots --------------------------------------------------------------------------------


def chain(stores, *names, labels=None, lease=""):
    """Commit a stack of snapshots that have folders."""
    backend, parent = stores.snapshotter("copy"), ""
    for layer in names:
        backend.prepare(f"{layer} active", parent, lease=lease)
        backend.commit(Commit(name=layer, key=f"{layer} active", labels=labels or {}, lease=lease))
        parent = layer
    return backend


def snapshots(stores):
    return {info.key for info in stores.snapshotter("copy").walk()}


def folders(stores):
    return len(list((stores.root.snapshots / "copy").iterdir()))


def test_a_config_holds_a_snapshot_and_all_below(stores):
    chain(stores, "1", "2", "3")
    chain(stores, "x", "y")
    name(stores, "a", put(stores, b"config", {f"{SNAPSHOT}.copy": "2"}))
    collected = stores.collect()
    assert snapshots(stores) == {"1", "2"}
    assert folders(stores) == 2
    assert set(collected.snapshots) == {snapshot_node("copy", key) for key in "3xy"}
    assert not list(stores.root.trash.iterdir())


@pytest.mark.parametrize("make", ["prepare", "view"])
def test_gc_20_what_may_be_in_use_holds(stores, make):
    backend = chain(stores, "1", "2")
    getattr(backend, make)("rootfs", "2")
    stores.collect()
    assert snapshots(stores) == {"1", "2", "rootfs"}
    backend.remove("rootfs")
    stores.collect()
    assert not snapshots(stores)


def test_work_in_progress_lives_with_its_lease(stores):
    with leased(stores.root.meta, "default") as lease:
        chain(stores, "1", lease=lease).prepare("work", "1", lease=lease)
        stores.collect()
        assert snapshots(stores) == {"1", "work"}
    stores.collect()
    assert not snapshots(stores)
    assert not folders(stores)


def test_a_snapshot_may_be_a_root_and_hold_content(stores):
    held = put(stores, b"x")
    backend = chain(stores, "1")
    backend.update("1", {**ROOT, f"{CONTENT}.0": held})
    stores.collect()
    assert (snapshots(stores), blobs(stores)) == ({"1"}, {held})


def test_gc_03_children_go_first(stores):
    """In whatever order the names sort."""
    chain(stores, "b", "c", "a")
    order = [node.key for node in stores.collect().snapshots]
    assert order == ["a", "c", "b"]


def test_gc_02_a_deep_chain_goes_in_one_pass(stores):
    """Its depth must not be paid for once per snapshot: ten thousand of them are a second's work."""
    depth = 3000
    store = MetaStore(stores.root.meta, "copy", "default")
    record, _ = store.create("seed", Kind.ACTIVE, "", {}, "")
    steps = [
        msgspec.structs.replace(
            record, key=f"{n}", id=n, kind=Kind.COMMITTED, parent=f"{n - 1}" if n else "", lease=""
        )
        for n in range(depth)
    ]
    with stores.root.meta.write() as txn:
        for step in steps:
            ledger.put_snapshot(txn, "copy", "default", step)
    store.remove("seed")
    looked_at = count_lookups(stores)
    assert [node.key for node in looked_at.snapshots] == [str(n) for n in reversed(range(depth))]
    assert not list(store.walk())


def count_lookups(stores):
    """Collect, and fail if the work grows with the square of the depth."""
    calls = 0

    def trace(_frame, event, _argument):
        nonlocal calls
        calls += event == "line"
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        collected = collect(stores.root.meta, Places(namespace="default", backends=["copy"]))
    finally:
        sys.settrace(old)
    assert calls < 1_500_000
    return collected


# -- dry run, holders -------------------------------------------------------------------------


def test_a_dry_run_predicts_and_changes_nothing(stores):
    name(stores, "a", put(stores, b"config", {f"{SNAPSHOT}.copy": "2"}))
    chain(stores, "1", "2", "3")
    put(stores, b"garbage" * 1000)
    stores.content.ingest("left", lease="").close()
    died(stores, "left", expires=0)
    hold(stores, Lease(id="expired", created=1, labels=expiring(1)))
    before = state(stores)
    predicted = stores.collect(dry_run=True)
    assert state(stores) == before
    assert predicted == stores.collect()
    assert predicted.blob_bytes == 7000
    assert predicted.ingests == ["left"]
    assert predicted.leases == ["expired"]
    assert [node.key for node in predicted.snapshots] == ["3"]


def test_gc_08_a_second_collection_finds_nothing(stores):
    put(stores, b"garbage")
    chain(stores, "1", "2")
    stores.collect()
    before = state(stores)
    again = stores.collect()
    assert not any((again.blobs, again.snapshots, again.ingests, again.leases))
    assert (again.blob_bytes, again.snapshot_bytes) == (0, 0)
    assert state(stores) == before


def test_a_blob_that_is_held_is_not_removed_by_hand(stores):
    below = put(stores, b"below")
    above = put(stores, b"above", {CONTENT: below})
    name(stores, "a", above)
    name(stores, "b", above)
    with pytest.raises(FailedPrecondition, match="belongs to image"):
        stores.remove_blob(below)
    stores.images.remove("a")
    stores.images.remove("b")
    with leased(stores.root.meta, "default") as lease:
        stores.content.info(below, lease=lease)
        with pytest.raises(FailedPrecondition, match="work under way"):
            stores.remove_blob(below)
    stores.remove_blob(below)
    assert blobs(stores) == {above}


def test_what_fails_takes_only_its_own(stores):
    """An import that fails is no reason to collect what someone may still want."""
    other = put(stores, b"garbage of before")
    with leased(stores.root.meta, "default") as dead:
        stores.content.ingest("to be gone on with", lease=dead).close()
    with leased(stores.root.meta, "default") as lease:
        put(stores, b"mine", lease=lease)
        kept = put(stores, b"named meanwhile", lease=lease)
        stores.content.ingest("half", lease=lease).close()
        name(stores, "a", kept)
        stores.give_up(lease, seconds=10)
    assert blobs(stores) == {other, kept}
    assert [status.ref for status in stores.content.statuses()] == ["to be gone on with"]


def test_giving_up_is_bounded_as_a_whole_and_a_collection_does_the_rest(stores):
    with leased(stores.root.meta, "default") as lease:
        put(stores, b"mine" * EXTENT, lease=lease)
        stores.snapshotter("overlay").prepare("mine", lease=lease)
        stores.give_up(lease, seconds=-1)
    assert blobs(stores) == set()
    with stores.root.meta.read() as txn:
        assert len(TRASH.scan(txn)) == 2
    assert extents(stores)
    stores.collect()
    assert not extents(stores)


def test_mark():
    edges = {1: [2, 3], 2: [1], 3: [4], 5: [1], 6: [6]}
    assert reachable([1, 1], lambda node: edges.get(node, [])) == {1, 2, 3, 4}
    assert reachable([], lambda _: [1]) == set()
    assert len(reachable([0], lambda n: [n + 1] if n < 50_000 else [])) == 50_001
    assert list(holders_first([4, 3, 1, 6], lambda node: edges.get(node, []))) == [1, 3, 4, 6]
    assert by_level([5, 1, 3, 4, 2], lambda node: {5: [1], 1: [3, 2]}.get(node, []), str) == [
        4,
        5,
        1,
        2,
        3,
    ]
    assert sorted(holders_first([2, 5, 1], lambda node: edges.get(node, []))) == [1, 2, 5]


# -- faults -----------------------------------------------------------------------------------


def some_garbage(stores):
    """Make what goes and what stays, of every kind that has bytes or folders."""
    files = Files()
    path = files.name(files.image()).folder(stores.root.path.parent / "image")
    import_image(stores, path)
    for data in (b"1", b"2", b"3"):
        put(stores, data * EXTENT)
    chain(stores, "keep")
    stores.snapshotter("copy").update("keep", ROOT)
    chain(stores, "a", "b", "c")


def settled(stores):
    """Return what must be the same after any recovery."""
    found = records(stores)
    found.pop("snapshots")  # its times differ from one store to the next
    numbers = {blob.number for blob in stores.content.walk()}
    assert {number for number, _ in extents(stores)} == numbers
    for blob in stores.content.walk():
        stores.content.verify(blob.digest)
    assert not found["trash"]
    assert not list(stores.root.trash.iterdir())
    assert folders(stores) == len(snapshots(stores))
    return {name: len(entries) for name, entries in found.items()}, snapshots(stores), blobs(stores)


_POINTS = [
    *[("gc.swept", 1)],
    *[("trash.moved", nth) for nth in (1, 2, 3)],
    *[("trash.emptied", nth) for nth in (1, 2)],
]


@pytest.mark.parametrize("action", ["error", "eio"])
@pytest.mark.parametrize(("point", "nth"), _POINTS)
def test_gc_09_a_fault_is_made_good_by_the_next_collection(stores, point, nth, action):
    some_garbage(stores)
    with armed(point, action, nth):
        try:
            stores.collect()
        except (EngineError, OSError):
            assert point != "trash.moved", "one folder that resists does not end the rest (GC-21)"
    if point != "gc.swept":  # after a part of the sweep
        assert snapshots(stores) == {"keep"}
        assert len(blobs(stores)) == 3
    stores.collect()
    counts, kept, digests = settled(stores)
    assert (kept, len(digests)) == ({"keep"}, 3)
    assert counts["images"] == 1


_COLLECTOR = """
import sys
from pathlib import Path
from engine.failpoints import arm
from engine.oci.platform import Platform
from engine.stores import open_stores
arm(sys.argv[2])
with open_stores(Path(sys.argv[1]), "default", Platform(os="linux", architecture="amd64")) as stores:
    stores.collect()
"""


@pytest.mark.parametrize("point", ["gc.swept=kill", "trash.moved=kill@2", "trash.emptied=kill"])
def test_gc_09_a_collector_that_is_killed(stores, point):
    some_garbage(stores)
    child = subprocess.run(
        [sys.executable, "-c", _COLLECTOR, str(stores.root.path), point], check=False, timeout=60
    )
    assert child.returncode == -signal.SIGKILL
    stores.collect()
    _, kept, digests = settled(stores)
    assert (kept, len(digests)) == ({"keep"}, 3)


def waiting(stores):
    with stores.root.meta.read() as txn:
        return len(TRASH.scan(txn))


def test_gc_21_what_lies_in_the_way_of_a_folder_goes_with_it(stores):
    chain(stores, "1", "2")
    (stores.root.trash / "copy-1").write_bytes(b"in the way")
    stores.collect()
    assert not snapshots(stores)
    assert waiting(stores) == 0
    assert not folders(stores)
    assert not list(stores.root.trash.iterdir())


# -- other processes --------------------------------------------------------------------------

_CHILD = """
import os, sys
from pathlib import Path
from engine.metadata.leases import leased
from engine.oci.platform import Platform
from engine.stores import open_stores
with open_stores(Path(sys.argv[1]), "default", Platform(os="linux", architecture="amd64")) as stores:
    with leased(stores.root.meta, "default") as lease:
        with stores.content.ingest("done", lease=lease) as writer:
            writer.write(b"leased")
            writer.commit()
        stores.content.ingest("begun", lease=lease).write(bytes(1 << 20))
        stores.snapshotter("copy").prepare("work", lease=lease)
        print("ready", flush=True)
        sys.stdin.readline()
        os._exit(0)
"""


def test_gc_05_a_lease_lives_as_long_as_its_process(stores):
    """What a living process leased stays; what a dead one left behind goes, its lease with it."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(stores.root.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        while_alive = stores.collect()
        kept = (blobs(stores), snapshots(stores), len(stores.content.statuses()))
    finally:
        child.communicate("go\n")
    assert not any((while_alive.blobs, while_alive.snapshots, while_alive.ingests, while_alive.leases))
    assert kept == ({digest_of(b"leased")}, {"work"}, 1)
    after = stores.collect()
    assert (after.blobs, after.ingests, len(after.leases)) == ([digest_of(b"leased")], ["begun"], 1)
    assert not any(records(stores).values())
    assert not extents(stores)
    assert not folders(stores)


_IMPORTER = """
import sys
from functools import partial
from pathlib import Path
import pytest, trio
from engine.app import open_engine
from tests.meddling import meddled

def ask(_number):
    print("may I?", flush=True)
    assert sys.stdin.readline() == "go\\n"

async def main(root, folder):
    async with open_engine(root) as engine:
        with meddled(pytest.MonkeyPatch(), engine.stores.root.meta, ask):
            for number in range(4):
                await engine.import_image(folder, name=f"image:{number}")
                if number % 2:
                    await trio.to_thread.run_sync(engine.stores.images.remove, f"image:{number}")
                    await trio.to_thread.run_sync(engine.stores.images.remove, f"image:{number - 1}")

trio.run(main, *sys.argv[1:])
"""


def test_gc_01_collections_beside_imports(stores, tmp_path):
    """One before each transaction of another process, with garbage each time: never what it holds.

    Twice the image is found in the store, and twice it is garbage before.
    """
    files = Files()
    path = files.name(files.image([b"\0" * 1024, bytes(EXTENT + 3)])).folder(tmp_path / "image")
    child = subprocess.Popen(
        [sys.executable, "-c", _IMPORTER, str(stores.root.path), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    rounds, holding = 0, 0
    with child:
        for _ in child.stdout:
            waste = put(stores, b"waste %d" % rounds)
            with stores.root.meta.read() as txn:
                items = LEASE_ITEMS.scan(txn, "default")
            held = {item.key for item in items if item.kind == CONTENT_KIND}
            assert held <= blobs(stores)
            gone = stores.collect().blobs
            assert waste in gone
            assert held <= blobs(stores)
            for image in stores.images.walk():
                for part in (image.target, *stores.resolve(image.target).manifest.layers):
                    assert part.digest in blobs(stores)
            rounds, holding = rounds + 1, holding + bool(held)
            child.stdin.write("go\n")
            child.stdin.flush()
    assert child.returncode == 0
    assert rounds > 40
    assert holding > rounds / 2
    stores.collect()
    assert not any(records(stores).values())
    assert not extents(stores)


# -- marks ------------------------------------------------------------------------------------


def test_a_mark_that_cannot_be_read_is_nobodys(stores):
    garbage = put(stores, b"garbage")
    damage(stores, MARKS, "default")
    assert stores.collect().blobs == [garbage]
    assert not records(stores)["marks"]


def test_nobody_waits_for_a_collection_that_could_not_take_its_mark_away(stores, monkeypatch):
    """The process lives on, and its disk was full, or failed."""

    def fails(*_):
        raise EngineError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(marks, "end", fails)
        with pytest.raises(EngineError, match="no space"):
            stores.collect()
    garbage = put(stores, b"garbage")
    assert records(stores)["touched"]
    others = Owners(stores.root.path / "owners")
    with stores.root.meta.read() as txn:
        assert marks.collector(others, txn, "default") is None
    assert os.listdir(stores.root.path / "owners") == [stores.root.owners.me.id]
    monkeypatch.setattr(limits, "COLLECT_WAIT_S", 0)
    assert stores.collect().blobs == [garbage]


def test_who_waits_for_another_collection_is_told(stores, monkeypatch):
    with stores.root.owners.at_work() as other:
        with stores.root.meta.write() as txn:
            assert marks.begin(txn, "default", other)
        monkeypatch.setattr(limits, "COLLECT_WAIT_S", 0)
        with pytest.raises(Unavailable, match=f"{other} is collecting"):
            stores.collect()
        assert len(records(stores)["marks"]) == 1


def test_nobody_waits_long_for_a_collection_that_does_not_get_on(stores, monkeypatch):
    """But for one that does, however long that is."""
    steps = iter([10, 20, 25])  # seconds after which another looks, at which it gets on

    class Time:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, _):
            later = next(steps, None)
            if later:
                stores.root.owners.beat(other)
                self.now += later
            else:
                self.now += 31

    with stores.root.owners.at_work() as other:
        with stores.root.meta.write() as txn:
            assert marks.begin(txn, "default", other)
        monkeypatch.setattr(collecting, "time", clock := Time())
        with pytest.raises(Unavailable, match=f"{other} is collecting and has not got on for 30 s"):
            stores.collect()
        assert clock.now == 10 + 20 + 25 + 31


def test_a_collection_gets_on_as_it_reads_and_sweeps(stores, monkeypatch):
    monkeypatch.setattr(survey, "_RELEASE_EVERY", 1)
    monkeypatch.setattr(collecting, "_SLICE", 1)
    beats = []
    monkeypatch.setattr(Owners, "beat", lambda _, owner: beats.append(owner.id))
    at_mark = []
    some_garbage(stores)
    stores.collect(report=lambda step, *_: at_mark.append(len(beats)))
    assert at_mark[0] > 10
    assert len(beats) > at_mark[0]


def test_what_was_touched_goes_in_short_transactions_when_its_mark_ends(stores, monkeypatch):
    """Also where whoever collected died: the next to open the store sees to it."""
    monkeypatch.setattr(marks, "_SLICE", 10)
    with stores.root.owners.at_work() as other, stores.root.meta.write() as txn:
        marks.begin(txn, "default", other)
    leases = [Lease(id=str(number), created=1) for number in range(35)]
    with stores.root.meta.write() as txn:
        for lease in leases:
            ledger.put(txn, "default", lease)
    before = stores.root.meta.transactions()
    marks.end_dead(stores.root.meta)
    assert stores.root.meta.transactions() == before + 4
    left = records(stores)
    assert left["marks"] == left["touched"] == []
    (stores.root.path / "boot").write_text("another")
    with stores.root.owners.at_work() as other, stores.root.meta.write() as txn:
        marks.begin(txn, "default", other)
    recover(stores.root)
    assert not records(stores)["marks"]


def test_what_was_touched_is_spared_in_short_transactions_before_anything_is_dropped(
    stores, monkeypatch
):
    """A chain of blobs that is named anew once it was marked as garbage; each step has no time."""
    below = put(stores, b"0")
    for number in range(1, 30):
        below = put(stores, b"%d" % number, {f"{CONTENT}.0": below})
    other = put(stores, b"garbage")
    there = blobs(stores)
    monkeypatch.setattr(collecting, "_SLICE_S", -1)
    survey, step, steps = collecting.survey, collecting._Sparing.step, []

    def surveys(*args):
        found = survey(*args)
        stores.content.update(below, ROOT)
        return found

    def steps_on(self, txn):
        steps.append(step(self, txn))
        return steps[-1]

    monkeypatch.setattr(collecting, "survey", surveys)
    monkeypatch.setattr(collecting._Sparing, "step", steps_on)
    assert stores.collect().blobs == [other]
    assert blobs(stores) == there - {other}
    assert steps.count(False) >= 28


@pytest.mark.parametrize(("bound", "slices"), [("", 1), ("_CHANGES", 10)])
def test_a_slice_is_bounded_by_what_it_changes(stores, monkeypatch, bound, slices):
    """What changed has to be written at the end of it, and whoever waits waits for that."""
    for number in range(10):
        put(stores, b"%d" % number)
    monkeypatch.setattr(collecting, "_SLICE_S", 60)
    if bound:
        monkeypatch.setattr(collecting, bound, 1)
    swept = []
    drop_some = collecting._drop_some
    monkeypatch.setattr(collecting, "_drop_some", lambda *args: swept.append(args) or drop_some(*args))
    assert len(stores.collect().blobs) == 10
    assert len(swept) - 1 in {slices - 1, slices}


def test_two_collectors(stores):
    """Both delete what either dropped; neither minds."""
    some_garbage(stores)
    command = [sys.executable, "-c", _COLLECTOR, str(stores.root.path), ""]
    children = [
        subprocess.Popen(command, env={**os.environ, "PYTHONWARNINGS": "error"}) for _ in range(2)
    ]
    stores.collect()
    assert [child.wait() for child in children] == [0, 0]
    stores.collect()
    _, kept, digests = settled(stores)
    assert (kept, len(digests)) == ({"keep"}, 3)
