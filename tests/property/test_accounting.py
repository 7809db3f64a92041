"""What `du` says of random stores, held against what a collection then does."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engine.accounting import Accounts, ContainerShare, Share, StoreUsage
from engine.content.extents import stored_bytes
from engine.fs.usage import taken
from engine.gc.collect import Collected
from engine.kv.schema import BLOBS, INGESTS, SNAPSHOTS, Container, now
from engine.metadata import ledger
from engine.metadata.containers import ContainerState
from engine.provision.places import folder_of, mount_keys
from engine.root import Root
from engine.stores import Stores
from tests.conftest import AMD64
from tests.filesystems import shared_memory
from tests.property.test_gc_model import build, expiring, graphs, image, put, run


def _account(stores: Stores) -> StoreUsage:
    return Accounts(stores.root, stores.namespace, ()).store(stores.images.walk())


def _share(collected: Collected, of_ingests: int = 0) -> Share:
    return Share(collected.blob_bytes + of_ingests, collected.snapshot_bytes)


def _everything(root: Root) -> Share:
    with root.meta.read() as txn:
        sizes = {blob.number: blob.size for blob in BLOBS.scan(txn)}
        ingests = [ingest.number for ingest in INGESTS.scan(txn)]
        sizes |= {number: stored_bytes(root.blobs, number) for number in ingests}
        return Share(sum(sizes.values()), sum(snapshot.size for snapshot in SNAPSHOTS.scan(txn)))


@given(graph=graphs(), twice=st.booleans())
def test_an_image_keeps_what_its_removal_and_a_collection_free(graph, twice):
    with shared_memory() as folder, Root(folder / "root") as root:
        made = build(Stores(root, "default", AMD64), graph)
        if twice:
            build(Stores(root, "default", AMD64), graph)  # in another namespace
        found = _account(made)
        parts = (found.exclusive, found.shared, found.garbage, found.elsewhere)
        assert sum(parts, Share()) == _everything(root)
        assert found.exclusive == sum((one.exclusive for one in found.images), Share())
        assert (found.elsewhere.total > 0) <= twice
        begun = {status.ref: status.offset for status in made.content.statuses()}
        collected = run(made)
        assert _share(collected, sum(begun[ref] for ref in collected.ingests)) == found.garbage
        for row in found.images:
            # What two keep neither keeps alone, until one goes.
            (left,) = (one for one in _account(made).images if one.name == row.name)
            assert left.exclusive + left.shared == row.exclusive + row.shared
            made.images.remove(row.name)
            assert _share(run(made)) == left.exclusive
            if row is found.images[0]:
                assert left == row
            event(f"an image frees {'something' if left.exclusive.total else 'nothing'}")
            event(f"an image shares {'something' if left.shared.total else 'nothing'}")


def test_what_is_dropped_and_not_deleted_yet_is_garbage(stores: Stores):
    data = b"x" * 100_000  # not so little that it goes with its record
    with stores.content.ingest("large", lease="") as writer:
        writer.write(data)
        writer.commit()
    assert _account(stores).garbage == Share(len(data))
    run(stores)
    assert _account(stores).garbage == Share(len(data))
    stores.content.cleanup()
    assert _account(stores).garbage == Share()


@pytest.mark.parametrize("expires", [-1, 1])
def test_what_only_an_expired_name_keeps_is_garbage(stores: Stores, expires: int):
    put(stores, "0", {})
    image(stores, "0")
    (name,) = stores.images.walk()
    kept = msgspec.structs.replace(name, labels=expiring(now() + expires * 10**12))
    with stores.root.meta.write() as txn:
        ledger.put(txn, stores.namespace, kept)
    found = _account(stores)
    (row,) = found.images
    assert (row.exclusive.total > 0, found.garbage.total > 0) == (expires > 0, expires < 0)
    assert found.exclusive + found.garbage == _everything(stores.root)
    assert _share(run(stores)) == found.garbage


@st.composite
def _containers(draw) -> dict[str, tuple[int, int]]:
    """Return containers, and of each how many bytes it wrote to its root and to its log."""
    sizes = st.sampled_from([0, 1, 5_000, 100_000])
    return draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(sizes, sizes)))


@given(graph=graphs(), containers=_containers(), elsewhere=_containers())
def test_what_containers_wrote_is_theirs_and_all_adds_up(graph, containers, elsewhere):
    with shared_memory() as folder, Root(folder / "root") as root:
        made = build(Stores(root, "default", AMD64), graph)
        before = _account(made)
        expected = [_container(made, name, *sizes) for name, sizes in sorted(containers.items())]
        other = Stores(root, "other", AMD64)
        others = [_container(other, name, *sizes) for name, sizes in sorted(elsewhere.items())]
        found = _account(made)
        assert found.containers == expected
        assert _account(other).containers == others
        # What is somebody's stays his, whoever else there is.
        assert (found.images, found.exclusive) == (before.images, before.exclusive)
        assert (found.shared, found.garbage) == (before.shared, before.garbage)
        theirs = sum(one.written for one in others)
        assert found.elsewhere.snapshots == before.elsewhere.snapshots + theirs
        for stores in (made, other):
            assert _account(stores).total == pytest.approx(taken(root.path)[0], abs=1 << 16)
        event(f"{len(expected)} containers, {len(others)} elsewhere")


def _container(stores: Stores, name: str, written: int, logged: int) -> ContainerShare:
    """Make what there is of a container but its mount; return what it takes up."""
    unique = f"{stores.namespace}{name}".encode().hex().rjust(16, "0")[-16:]
    container = Container(
        id=name,
        unique=unique,
        state=str(ContainerState.STOPPED),
        since={},
        image="image",
        target="",
        backend="copy",
        created=ord(name),
        boot="",
    )
    with stores.root.meta.write() as txn:
        stores.containers.put_new(txn, container)
    (mount,) = stores.snapshotter("copy").prepare(mount_keys(container)[0])
    (Path(mount.source) / "data").write_bytes(bytes(written))
    folder = folder_of(stores.root.path, unique)
    folder.mkdir(parents=True)
    (folder / "log").write_bytes(bytes(logged))
    return ContainerShare(
        name=name,
        image="image",
        written=taken(Path(mount.source).parent)[0],
        files=taken(folder)[0],
    )
