"""What `du` says of random stores, held against what a collection then does."""

from hypothesis import event, given
from hypothesis import strategies as st

from engine.accounting import Accounts, Share, StoreUsage
from engine.gc.collect import Collected
from engine.kv.schema import BLOBS, INGESTS, SNAPSHOTS
from engine.root import Root
from engine.stores import Stores
from tests.conftest import AMD64
from tests.filesystems import shared_memory
from tests.property.test_gc_model import build, graphs, run


def _account(stores: Stores) -> StoreUsage:
    return Accounts(stores.root, stores.namespace, ()).store(stores.images.walk())


def _share(collected: Collected) -> Share:
    return Share(collected.blob_bytes, collected.snapshot_bytes)


def _everything(root: Root) -> Share:
    with root.meta.read() as txn:
        blobs = {blob.number: blob.size for blob in BLOBS.scan(txn)}
        assert not any(ingest.number in blobs for ingest in INGESTS.scan(txn))
        return Share(sum(blobs.values()), sum(snapshot.size for snapshot in SNAPSHOTS.scan(txn)))


@given(graph=graphs(), twice=st.booleans())
def test_an_image_keeps_what_its_removal_and_a_collection_free(graph, twice):
    with shared_memory() as folder, Root(folder / "root") as root:
        made = build(Stores(root, "default", AMD64), graph)
        if twice:
            build(Stores(root, "default", AMD64), graph)  # in another namespace
        found = _account(made)
        parts = (found.exclusive, found.shared, found.garbage, found.elsewhere)
        assert sum(parts, Share()) == _everything(root)
        assert found.exclusive == sum((image.exclusive for image in found.images), Share())
        assert (found.elsewhere.total > 0) <= twice
        assert _share(run(made)) == found.garbage
        for image in found.images:
            # What two keep neither keeps alone, until one goes.
            (now,) = (row for row in _account(made).images if row.name == image.name)
            assert now.exclusive + now.shared == image.exclusive + image.shared
            made.images.remove(image.name)
            assert _share(run(made)) == now.exclusive
            if image is found.images[0]:
                assert now == image
            event(f"an image frees {'something' if now.exclusive.total else 'nothing'}")
            event(f"an image shares {'something' if now.shared.total else 'nothing'}")


@given(graph=graphs())
def test_what_is_dropped_and_not_deleted_yet_is_garbage(graph):
    with shared_memory() as folder, Root(folder / "root") as root:
        made = build(Stores(root, "default", AMD64), graph)
        before = _account(made).garbage
        dropped = run(made)
        after = _account(made).garbage
        assert (after.content, after.snapshots) == (
            before.content,
            before.snapshots - dropped.snapshot_bytes,
        )
        made.content.cleanup()
        assert _account(made).garbage.content == 0
