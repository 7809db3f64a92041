"""What one image costs is the same in a store of many: counted in records that are read, not in time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.many import BACKEND, Shape, base_layer, fill, image_name
from engine.accounting import Accounts
from engine.cli import shapes
from engine.gc.holding import holder
from engine.images.states import parts_of
from engine.kv.schema import Lease, now
from engine.kv.table import Table
from engine.metadata import ledger
from engine.metadata.nodes import IMAGE, Node, blob_node, snapshot_node
from engine.oci.digest import digest_of
from engine.root import Root
from engine.stores import Stores
from tests.conftest import AMD64

FEW, MANY = Shape(blobs=72, snapshots=48, images=10), Shape(blobs=2400, snapshots=1600, images=360)
assert FEW.layers == MANY.layers


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note from which tables records are read."""
    read: list[str] = []
    decode = Table._decode

    def counting(table, raw):
        read.append(table.name)
        return decode(table, raw)

    with monkeypatch.context() as patched:
        patched.setattr(Table, "_decode", counting)
        yield read


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stores, Stores]]:
    """A store of ten images and one of many; all share their lowest layer."""
    folder: Path = tmp_path_factory.mktemp("large")
    with Root(folder / "few") as few, Root(folder / "many") as many:
        pair = Stores(few, "default", AMD64), Stores(many, "default", AMD64)
        for stores, shape in zip(pair, (FEW, MANY), strict=True):
            fill(stores, shape)
        yield pair


def _inspect(stores: Stores) -> Callable[[], object]:
    def run() -> None:
        image = stores.resolve(stores.images.get(image_name(3)).target)
        assert parts_of(stores, image).unpacked == {BACKEND: image.chain[-1]}

    return run


def _account(stores: Stores) -> Callable[[], object]:
    accounts, image = Accounts(stores.root, "default", ()), stores.images.get(image_name(3))
    return lambda: accounts.image(image)


def _give_up(stores: Stores) -> Callable[[], object]:
    lease = "failing"
    with stores.root.meta.write() as txn:
        record = Lease(id=lease, created=now(), owner=stores.root.owners.me)
        ledger.put(txn, "default", record)
    for number in range(3):
        data = b"%d of a failed import" % number
        digest = digest_of(data)
        with stores.content.ingest(digest, lease=lease, expected=digest, total=len(data)) as writer:
            writer.write(data)
            writer.commit()
    stores.content.pin([base_layer()], lease)
    return lambda: stores.give_up(lease, seconds=60)


def _list_first(stores: Stores) -> Callable[[], object]:
    records = stores.images.walk()
    return lambda: next(map(shapes.images(stores), records))


def _complete(stores: Stores) -> Callable[[], object]:
    found = base_layer()
    return lambda: stores.content.beginning(found[:20], 500)


@pytest.mark.parametrize("make", [_inspect, _account, _give_up, _list_first, _complete])
def test_one_image_costs_the_same(
    two: tuple[Stores, Stores], make: Callable[[Stores], Callable[[], object]], monkeypatch
):
    costs = []
    for stores in two:
        run = make(stores)
        with _counted(monkeypatch) as read:
            run()
        costs.append(len(read))
    few, many = costs
    assert many <= 1.5 * few + 5, (few, many)
    assert few < 300


def test_who_holds_a_layer_of_many_images_is_known_by_the_first(two: tuple[Stores, Stores], monkeypatch):
    stores = two[1]
    with stores.root.meta.read() as txn, _counted(monkeypatch) as read:
        found = holder(stores.root.owners, txn, "default", blob_node(base_layer()))
    assert found is not None
    assert found.kind == IMAGE
    assert len(read) < 30


def test_what_is_known_of_holders_changes_no_answer(two: tuple[Stores, Stores]):
    """With what was found out before, in any order, and without."""
    stores = two[0]
    owners, known = stores.root.owners, dict[Node, Node | None]()
    nodes = [blob_node(blob.digest) for blob in stores.content.walk()]
    nodes += [snapshot_node(BACKEND, info.key) for info in stores.snapshotter(BACKEND).walk()]
    with stores.root.meta.read() as txn:
        for node in [*nodes, *reversed(nodes)]:
            told = holder(owners, txn, "default", node, known=known)
            assert (told is None) == (holder(owners, txn, "default", node) is None), node
    assert None in known.values()  # a tenth is garbage


def test_a_walk_reads_a_batch_at_a_time(two: tuple[Stores, Stores], monkeypatch):
    backend = two[1].snapshotter(BACKEND)
    assert len(list(backend.walk())) > 1000
    with _counted(monkeypatch) as read:
        list(islice(backend.walk(), 10))
    assert len(read) <= 1000
