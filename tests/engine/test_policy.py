"""Policies: which images go when the disk fills up or they grow old, and which never do."""

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.gc import policy as policies
from engine.gc.collect import collect
from engine.gc.policy import Disk, Policy, enforce
from engine.gc.survey import Places
from engine.kv.schema import BLOBS, IMAGES, SNAPSHOTS, Blob, Image, Lease, Snapshot, now
from engine.metadata import ledger
from engine.metadata.nodes import blob_node
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from tests.engine.image_files import MANIFEST

S = 10**9
MINUTE = 60 * S
DAY = 86400 * S
PINNED = {"io.cri-containerd.pinned": "pinned"}
PLACES = Places(namespace="default", backends=["copy"])

_numbers = itertools.count(1)


def digest(name):
    return str(digest_of(name.encode()))


class Store:
    """Records of images, without bytes or folders, on a disk that holds what the records say."""

    def __init__(self, stores, total=1000):
        self.meta = stores.root.meta
        self.total = total
        self.at = now()
        self.collections = 0

    def write(self, *records, backend=""):
        with self.meta.write() as txn:
            for record in records:
                if backend:
                    ledger.put_snapshot(txn, backend, "default", record)
                else:
                    ledger.put(txn, "default", record)

    def blob(self, name, size, *holds, **labels):
        about = {f"containerd.io/gc.ref.content.{n}": digest(held) for n, held in enumerate(holds)}
        return Blob(
            digest=digest(name),
            number=next(_numbers),
            size=size,
            created=1,
            updated=1,
            labels=about | labels,
        )

    def image(self, name, layers, *, idle=3600 * S, names=(), labels=None, top=""):
        """Make an image with layers by name and size, last used so long ago."""
        self.write(*(self.blob(layer, size) for layer, size in layers.items()))
        anchor = {"containerd.io/gc.ref.snapshot.copy": top} if top else {}
        self.write(self.blob(f"config of {name}", 1, **anchor))
        self.write(self.blob(name, 1, f"config of {name}", *layers))
        target = Descriptor(media_type=MANIFEST, digest=digest(name), size=1)
        came = self.at - idle
        for one in (name, *names):
            self.write(
                Image(name=one, target=target, created=1, updated=1, used=came, labels=labels or {})
            )

    def snapshot(self, key, kind, parent="", size=0):
        record = Snapshot(
            key=key, id=next(_numbers), kind=kind, parent=parent, created=1, updated=1, size=size
        )
        self.write(record, backend="copy")

    def disk(self):
        with self.meta.read() as txn:
            used = sum(blob.size for blob in BLOBS.scan(txn, "default"))
            used += sum(one.size for one in SNAPSHOTS.scan(txn, "copy", "default"))
        return Disk(self.total, max(0, self.total - used))

    def enforce(self, policy, *, dry_run=False):
        def collected():
            self.collections += 1
            return collect(self.meta, PLACES, dry_run=dry_run)

        return enforce(self.meta, "default", policy, disk=self.disk, collect=collected, dry_run=dry_run)

    def images(self):
        with self.meta.read() as txn:
            return {image.name for image in IMAGES.scan(txn, "default")}


@pytest.fixture
def store(stores):
    return Store(stores)


def removed(enforced):
    return [name for one in enforced.chosen for name in one.names]


def test_below_high_nothing_goes(store):
    store.image("a", {"1": 847})
    enforced = store.enforce(Policy(high=85, low=80))
    assert (removed(enforced), store.images()) == ([], {"a"})
    assert (round(enforced.before), store.collections) == (85, 1)


def test_ms_37_from_high_on_the_least_recently_used_go_until_low(store):
    for name, idle in (("b", 3), ("d", 1), ("a", 4), ("c", 2)):
        store.image(name, {f"layer of {name}": 230}, idle=idle * 3600 * S)
    enforced = store.enforce(Policy(high=85, low=60))
    assert removed(enforced) == ["a", "b"]
    assert [one.bytes for one in enforced.chosen] == [232, 232]
    assert (store.images(), round(enforced.after)) == ({"c", "d"}, 46)
    assert store.collections == 2  # one for what was garbage before, one for both images


def test_garbage_goes_before_any_image(store):
    store.image("a", {"1": 400})
    store.write(store.blob("garbage", 500))
    enforced = store.enforce(Policy())
    assert (removed(enforced), round(enforced.after)) == ([], 40)


@pytest.mark.parametrize("state", ["pinned", "young", "active", "view", "lease"])
def test_what_never_goes(store, state):
    store.snapshot("base", "committed", size=10)
    store.snapshot("top", "committed", parent="base", size=10)
    labels = PINNED if state == "pinned" else None
    store.image("a", {"1": 900}, idle=MINUTE if state == "young" else DAY, labels=labels, top="top")
    if state in {"active", "view"}:
        store.snapshot("mine", state, parent="top")
    if state == "lease":  # removing it would free its manifest, and nothing more
        with store.meta.write() as txn:
            ledger.put(txn, "default", Lease(id="x", created=1))
            ledger.pin(txn, "default", "x", blob_node(digest("a")))
    enforced = store.enforce(Policy(max_age=None))
    assert (removed(enforced), store.images()) == ([], {"a"})
    assert store.collections == 1


def test_an_image_below_one_in_use_is_not_in_use_itself(store):
    store.snapshot("base", "committed", size=10)
    store.snapshot("top", "committed", parent="base", size=10)
    store.snapshot("mine", "active", parent="top")
    store.image("lower", {"1": 400}, top="base")
    store.image("upper", {"2": 400}, top="top")
    assert removed(store.enforce(Policy(high=80, low=50))) == ["lower"]


def test_all_names_of_an_image_go_at_once_or_none(store):
    store.image("a", {"1": 900}, names=["b"])
    assert removed(store.enforce(Policy(), dry_run=True)) == ["a", "b"]
    assert store.images() == {"a", "b"}
    with store.meta.write() as txn:
        image = IMAGES.get(txn, "default", "b")
        ledger.put(txn, "default", msgspec.structs.replace(image, used=store.at - S))
    assert removed(store.enforce(Policy())) == []
    with store.meta.write() as txn:
        ledger.put(txn, "default", image)
    enforced = store.enforce(Policy())
    assert (removed(enforced), store.images()) == (["a", "b"], set())


def test_what_two_images_share_goes_with_the_second(store):
    store.image("a", {"shared": 880}, idle=2 * DAY)
    store.image("b", {"shared": 880}, idle=DAY)
    enforced = store.enforce(Policy())
    assert [(one.names, one.bytes) for one in enforced.chosen] == [(["a"], 2), (["b"], 882)]


def test_an_image_goes_when_it_was_not_used_for_too_long_whatever_the_disk(store):
    store.image("old", {"1": 1}, idle=31 * DAY)
    store.image("pinned", {"2": 1}, idle=31 * DAY, labels=PINNED)
    store.image("new", {"3": 1}, idle=29 * DAY)
    enforced = store.enforce(Policy(max_age=30 * DAY))
    assert [(one.names, one.why) for one in enforced.chosen] == [(["old"], "its age")]
    assert store.images() == {"new", "pinned"}


def test_both_thresholds_at_100(store):
    """Kubernetes #79929: what is to be freed must not be negative."""
    store.image("a", {"1": 2000})
    enforced = store.enforce(Policy(high=100, low=100))
    assert (removed(enforced), enforced.before) == ([], 100)
    assert Disk(100, 7).above(100) == 0


def test_an_image_stays_that_may_have_been_used_since_that_was_noted(store):
    """Use is noted once a minute; the image here was noted just over two, its age in the policy, ago."""
    store.image("a", {"1": 900}, idle=130 * S)
    store.image("b", {"2": 900}, idle=181 * S)
    assert removed(store.enforce(Policy())) == ["b"]


def test_an_image_that_is_used_meanwhile_stays(store, monkeypatch):
    store.image("a", {"1": 900})
    remove, chosen = policies._remove, []

    def watched(meta, namespace, one):
        with meta.write() as txn:
            image = IMAGES.get(txn, "default", "a")
            ledger.put(txn, "default", msgspec.structs.replace(image, used=now()))
        chosen.append(one.names)
        return remove(meta, namespace, one)

    monkeypatch.setattr(policies, "_remove", watched)
    assert removed(store.enforce(Policy())) == []
    assert (chosen, store.images()) == ([["a"]], {"a"})


def test_a_record_that_cannot_be_read_costs_no_image(store):
    store.image("a", {"1": 900})
    with store.meta.write() as txn:
        txn.raw.put(b"\x00\x07default\x00\x01x", b"?", db=txn.databases["leases"])
    enforced = store.enforce(Policy())
    assert (removed(enforced), store.images()) == ([], {"a"})
    assert enforced.collected.is_halted


def test_without_a_clock_to_believe_no_image_goes(store, monkeypatch):
    store.image("a", {"1": 900})
    monkeypatch.setattr(policies, "time_of", lambda _clock: None)
    assert removed(store.enforce(Policy())) == []


@pytest.mark.parametrize(
    "values", [{"high": 101}, {"low": -1}, {"high": 50, "low": 60}, {"min_age": -1}, {"max_age": 1}]
)
def test_policies_that_make_no_sense(values):
    with pytest.raises(InvalidArgument):
        Policy(**values)


_IMAGES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=3, unique=True),  # layers
        st.sampled_from([0, 1, 3, 10, 100, 1000]),  # minutes idle
        st.booleans(),  # pinned
    ),
    max_size=6,
)


@settings(max_examples=settings().max_examples // 2)
@given(
    images=_IMAGES,
    sizes=st.lists(st.integers(0, 300), min_size=6, max_size=6),
    low=st.integers(0, 100),
    gap=st.integers(0, 40),
    oldest=st.sampled_from([None, 50, 500]),
)
def test_a_policy_against_its_rules(stores, images, sizes, low, gap, oldest):
    with stores.root.meta.write() as txn:
        for table in (BLOBS, IMAGES):
            table.clear(txn)
        ledger.rebuild(txn)
    store = Store(stores)
    for number, (layers, idle, pinned) in enumerate(images):
        parts = {f"layer {layer}": sizes[layer] for layer in layers}
        store.image(f"i{number}", parts, idle=idle * MINUTE + number, labels=PINNED if pinned else None)
    policy = Policy(
        high=min(100, low + gap), low=low, min_age=2 * MINUTE, max_age=oldest and oldest * MINUTE
    )
    before = store.disk()
    enforced = store.enforce(policy)
    gone = [int(name[1:]) for name in removed(enforced)]
    idle = [idle * MINUTE + number for number, (_, idle, _) in enumerate(images)]
    may = {n for n, (_, _, pinned) in enumerate(images) if not pinned and idle[n] >= policy.min_age}
    must = {n for n in may if policy.max_age is not None and idle[n] > policy.max_age}
    assert must <= set(gone) <= may
    assert gone == sorted(may, key=lambda n: -idle[n])[: len(gone)]  # the least recently used
    assert store.images() == {f"i{n}" for n in range(len(images))} - {f"i{n}" for n in gone}
    if before.used < policy.high:
        assert set(gone) == must
    else:
        assert store.disk().above(low) == 0 or set(gone) == may
    assert store.enforce(policy).chosen == []


def test_use_is_noted_once_a_minute(stores, store, monkeypatch):
    store.image("a", {}, idle=store.at)
    (image,) = stores.images.walk()
    assert image.used == 0
    image = msgspec.structs.replace(image, name="docker.io/library/a:latest")
    store.write(image)

    def used():
        stores.images.note_use(stores.images.get(image.name))
        return stores.images.get(image.name)

    first = used()
    assert now() - first.used < MINUTE
    assert used() == first
    monkeypatch.setattr("engine.metadata.images.now", lambda: first.used + 61 * S)
    assert used().used == first.used + 61 * S
    monkeypatch.setattr("engine.metadata.images.now", lambda: first.used)  # set back: noted again
    assert used().used == first.used
    gone = stores.images.get(image.name)
    stores.images.remove(image.name)
    stores.images.note_use(msgspec.structs.replace(gone, used=0))
    assert stores.images.named(image.name) is None


def test_the_disk_of_a_store(stores):
    disk = stores.disk()
    assert 0 < disk.free <= disk.total
    assert 0 <= disk.used <= 100
