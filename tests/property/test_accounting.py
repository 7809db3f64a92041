"""What `du` says of random stores, held against what a collection then does."""

import msgspec
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engine.accounting import Accounts, Share, StoreUsage
from engine.content.extents import stored_bytes
from engine.gc.collect import Collected
from engine.kv.schema import BLOBS, INGESTS, SNAPSHOTS, now
from engine.metadata import ledger
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
