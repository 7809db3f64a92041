"""A layer's data on a second base: what is done for it, who keeps it, what it counts as, its repair."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from engine import doubts, labels
from engine.accounting import Accounts
from engine.app import Engine, open_engine
from engine.callables import named
from engine.diff.apply import Applied, apply_layer
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument
from engine.fsck.findings import What
from engine.images.states import parts_of
from engine.kv.schema import LAYERS, SNAPSHOTS, Snapshot
from engine.metadata import ledger, unflushed
from engine.metadata.leases import leased
from engine.mount import mounted
from engine.oci.digest import digest_of
from engine.root import Root
from engine.snapshots import Commit, Snapshotter
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import differences, read_tree
from engine.unpack.jobs import ApplyJob
from tests.conftest import AMD64
from tests.filesystems import formatted
from tests.inline import workers_inline
from tests.support import tree_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

BASES = {
    "one": archive(member("etc/", "5", mode=0o755), member("etc/old", data=b"1")),
    "two": archive(member("etc/", "5", mode=0o755), member("etc/old", data=b"2"), member("more")),
    "odd": archive(member("etc/", "5", mode=0o700, uid=3), member("etc/kept", data=b"3")),
}
UPPER = archive(
    member("etc/.wh.old"),
    member("etc/new", data=b"new\n" * 30_000),
    member("opt/", "5"),
    *(member(f"opt/{n}", data=b"%d" % n * 9000) for n in range(20)),
    member("opt/linked", "1", link="opt/0"),
)
DIFF_ID = digest_of(UPPER)


def stand(backend: Snapshotter, base: str, *, diff_id: str = DIFF_ID, flush: bool = True) -> bool:
    """Commit the upper layer on a base; say whether its data was here."""
    name, key = f"on {base}", f"key {base}"
    backend.prepare(f"base {key}")
    apply_layer([BASES[base]], backend.sink(f"base {key}"), diff_id=digest_of(BASES[base]))
    about = {labels.DIFF_ID: digest_of(BASES[base])}
    committed(backend, Commit(name=base, key=f"base {key}", labels=about), flush=flush)
    is_reused = backend.reuse(key, diff_id) is not None
    if not is_reused:
        backend.prepare(key)
        apply_layer([UPPER], backend.sink(key), diff_id=DIFF_ID)
    about = {labels.DIFF_ID: DIFF_ID}
    step = Commit(name=name, key=key, parent=base, diff_id=diff_id, labels=about)
    committed(backend, step, flush=flush)
    return is_reused


def committed(backend: Snapshotter, step: Commit, *, flush: bool) -> None:
    for sealing in backend.sealing(step, flush=flush):
        _, failure = named(sealing.run)()(sealing.argument)
        if failure:
            raise failure
    backend.commit(step)


def folders(stores: Stores, name: str = "overlay") -> set[int]:
    return {int(path.name) for path in (stores.root.snapshots / name).iterdir()}


def record_of(stores: Stores, key: str) -> Snapshot:
    with stores.root.meta.read() as txn:
        record = SNAPSHOTS.get(txn, "overlay", "default", key)
    assert record is not None
    return record


def applied_again(job: ApplyJob) -> Applied:
    return apply_layer([UPPER], job.target, diff_id=DIFF_ID)


# -- what is done -----------------------------------------------------------------------------------


def test_images_on_ten_bases_apply_their_layers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uppers = [UPPER, archive(member("opt/x/", "5"), member("opt/x/y", data=b"y"))]
    bases = [archive(member("base", data=b"%d" % n)) for n in range(10)]

    async def work(engine: Engine) -> None:
        for number, base in enumerate(bases):
            image = layout(tmp_path / str(number), [base, *uppers], tag=f"x/{number}:1")
            await engine.import_image(image)
        counts = []
        for number in range(len(bases)):
            done = await engine.unpack(f"x/{number}:1", snapshotter="overlay")
            counts.append((done.layers, done.applied, done.reused, done.entries > 0))
        assert counts == [(3, 3, 0, True), *[(3, 1, 2, True)] * 9]
        stores = engine.stores
        assert len(folders(stores)) == len(bases) + len(uppers)
        tops = [
            parts_of(stores, stores.resolve(image.target)).unpacked["overlay"]
            for image in stores.images.walk()
        ]
        trees = [tree_of(stores, "overlay", top, tmp_path / "mnt") for top in tops]
        assert len({entries.pop(b"base").detail for entries in trees}) == len(bases)
        assert all(not differences(trees[0], other) for other in trees)
        checked = stores.check()
        assert not checked.findings
        assert checked.counts.by_attributes == 0

    async def opened() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            with workers_inline(monkeypatch, engine.stores.root):
                await work(engine)

    trio.run(opened)


def test_only_what_was_verified_is_reused(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one", diff_id="")  # with the label alone
    assert backend.reusable(DIFF_ID) is None
    assert backend.reusable("") is None
    with stores.root.meta.read() as txn:
        assert not LAYERS.count(txn)


def test_what_is_not_whole_is_not_reused(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    place = stores.root.snapshots / "overlay" / str(record_of(stores, "on one").id)
    for name in ("sealed", "outline"):  # as a store has them that is older than their being kept
        kept = (place / name).read_bytes()
        (place / name).unlink()
        assert backend.reusable(DIFF_ID) is None
        (place / name).write_bytes(kept)
        assert backend.reusable(DIFF_ID) == backend.usage("on one")


def test_a_whole_copy_of_a_tree_is_no_layer_to_reuse(stores: Stores) -> None:
    backend = stores.snapshotter("copy")
    assert [stand(backend, base) for base in ("one", "two")] == [False, False]


def test_namespaces_keep_to_themselves(stores: Stores) -> None:
    stand(stores.snapshotter("overlay"), "one")
    other = Stores(stores.root, "other", AMD64)
    assert other.snapshotter("overlay").reusable(DIFF_ID) is None
    other.close()


def test_what_is_begun_as_one_layer_is_committed_as_no_other(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    backend.reuse("key", DIFF_ID)
    with pytest.raises(InvalidArgument):
        backend.commit(Commit(name="x", key="key", parent="one", diff_id=digest_of(b"other")))
    with leased(stores.root.meta, "default") as lease:
        pass
    with pytest.raises(FailedPrecondition):
        backend.reuse("another", DIFF_ID, lease=lease)
    assert not [info for info in backend.walk() if info.key == "another"]


# -- on a base that asks for other marks ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_marked_otherwise_it_is_made_anew_without_its_blob(tmp_path: Path, kind: str) -> None:
    for name in ("disk", "mnt"):
        (tmp_path / name).mkdir()
    with formatted(kind, tmp_path / "image", tmp_path / "disk") as disk, Root(disk / "root") as root:
        stores = Stores(root, "default", AMD64)
        for name in ("overlay", "aufs"):
            backend = stores.snapshotter(name)
            assert [stand(backend, base) for base in BASES] == [False, True, True]
            assert len(folders(stores, name)) == len(BASES) + 2  # "one" and "two" share
            trees = {}
            for base in BASES:
                trees[base] = tree_of(stores, name, f"on {base}", tmp_path / "mnt")
                assert b"etc/old" not in trees[base]
                assert trees[base][b"opt/0"].links == (b"opt/linked",)
            assert trees["odd"][b"etc"].owner == (3, 0)
            assert trees["odd"][b"opt/7"] == trees["one"][b"opt/7"]
            backend.remove("on one")
            backend.remove("on two")
            assert backend.cleanup() == []
            assert tree_of(stores, name, "on odd", tmp_path / "mnt") == trees["odd"]
        stores.close()


def test_a_damaged_layer_is_applied_the_next_time(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    place = stores.root.snapshots / "overlay" / str(record_of(stores, "on one").id)
    (place / "fs/opt/5").unlink()
    with pytest.raises(DataLoss, match="is damaged"):
        stand(backend, "odd")
    for key in ("key odd", "odd"):
        backend.remove(key)
    assert backend.cleanup() == []
    assert not stand(backend, "odd")
    assert record_of(stores, "on odd").inodes == backend.measure("on odd").inodes


# -- who has it -------------------------------------------------------------------------------------


def test_a_shared_folder_goes_with_the_last_that_has_it(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    stand(backend, "two")
    one, two = record_of(stores, "on one"), record_of(stores, "on two")
    assert one.id == two.id
    found = stores.collect(dry_run=True)
    both = sum(record_of(stores, key).size for key in ("one", "two", "on one"))
    assert found.snapshot_bytes == both
    assert len(found.snapshots) == 4
    backend.update("on two", {labels.GC_ROOT: "x"})
    found = stores.collect(dry_run=True)
    assert found.snapshot_bytes == record_of(stores, "one").size
    assert stores.collect().snapshot_bytes == found.snapshot_bytes
    assert folders(stores) == {two.id, record_of(stores, "two").id}
    backend.update("on two", {labels.GC_ROOT: ""})
    assert stores.collect().snapshot_bytes == both - found.snapshot_bytes
    assert folders(stores) == set()


def test_work_that_is_given_up_keeps_nothing(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    with leased(stores.root.meta, "default") as lease:
        assert backend.reuse("key", DIFF_ID, lease=lease)
        assert record_of(stores, "key").layer == record_of(stores, "on one").id
        backend.remove("on one")
        backend.remove("one")
        stores.collect()
        assert len(folders(stores)) == 2
        assert not stores.check().findings
    stores.collect()
    assert folders(stores) == set()


def test_what_is_noted_can_be_noted_anew(stores: Stores) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one")
    stand(backend, "two")
    with stores.root.meta.write() as txn:
        before = LAYERS.scan(txn)
        ledger.rebuild(txn)
        assert LAYERS.scan(txn) == before
        assert {found.key for found in before} == {"on one", "on two"}
        LAYERS.clear(txn)
    found = stores.check(apply=applied_again).findings
    assert [one.done for one in found if one.what is What.EDGE] == ["noted anew from all records"]
    with stores.root.meta.read() as txn:
        assert LAYERS.scan(txn) == before


def test_du_counts_a_shared_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            with workers_inline(monkeypatch, engine.stores.root):
                for name in ("one", "two"):
                    image = layout(tmp_path / name, [BASES[name], UPPER], tag=f"{name}:1")
                    await engine.import_image(image, snapshotter="overlay")
            stores = engine.stores
            usage = Accounts(stores.root, "default", ()).store(stores.images.walk())
            sizes = {record.id: record.size for record in every(stores)}
            (shared,) = {r.size for r in every(stores) if r.diff_id == DIFF_ID}
            assert len(sizes) == 3
            assert usage.exclusive.snapshots + usage.shared.snapshots == sum(sizes.values())
            assert usage.shared.snapshots == shared
            assert {row.shared.snapshots for row in usage.images} == {shared}
            stores.images.remove(stores.images.walk()[0].name)
            freed = stores.collect().snapshot_bytes
            assert freed == usage.images[0].exclusive.snapshots
            (row,) = Accounts(stores.root, "default", ()).store(stores.images.walk()).images
            assert row.exclusive.snapshots == sum(sizes.values()) - freed

    trio.run(opened)


def every(stores: Stores) -> list[Snapshot]:
    with stores.root.meta.read() as txn:
        return list(SNAPSHOTS.scan(txn, "overlay", "default"))


# -- damage -----------------------------------------------------------------------------------------


def _content(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


@pytest.mark.parametrize("damage", [_content, Path.unlink])
def test_damage_to_a_shared_folder_is_told_of_and_mended_for_each(
    stores: Stores, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    backend = stores.snapshotter("overlay")
    for base, layer in [*BASES.items(), ("upper", UPPER)]:
        with stores.content.ingest(base, lease="") as writer:
            writer.write(layer)
            writer.commit()
    stand(backend, "one")
    stand(backend, "two")
    before = tree_of(stores, "overlay", "on two", tmp_path / "mnt")
    number = record_of(stores, "on one").id
    damage(stores.root.snapshots / "overlay" / str(number) / "fs/opt/3")
    found = stores.check().findings
    assert {one.name for one in found if one.what is What.SNAPSHOT and one.is_damage} == {
        "on one",
        "on two",
    }
    with mounted(backend.view("v", "on two"), tmp_path / "mnt"):
        stores.check(apply=applied_again)
        assert record_of(stores, "on two").id == number  # what is mounted stays
    backend.remove("v")
    stores.check(apply=applied_again)
    assert tree_of(stores, "overlay", "on two", tmp_path / "mnt") == before
    assert number not in folders(stores)
    assert not [one for one in stores.check().findings if one.is_damage]
    # The mended one can be reused as well.
    assert stand(backend, "odd")
    for name in ("on one", "on two"):
        folder = stores.root.snapshots / "overlay" / str(record_of(stores, name).id) / "fs"
        assert b"opt/3" in read_tree(folder)


@pytest.mark.parametrize("is_right", [True, False])
def test_a_shared_folder_that_was_not_flushed_is_doubted_for_all_that_have_it(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    backend = stores.snapshotter("overlay")
    for base, layer in [*BASES.items(), ("upper", UPPER)]:
        with stores.content.ingest(base, lease="") as writer:
            writer.write(layer)
            writer.commit()
    assert not stand(backend, "one", flush=False)
    assert stand(backend, "two", flush=False)
    before = tree_of(stores, "overlay", "on two", tmp_path / "mnt")
    number = record_of(stores, "on one").id
    if not is_right:
        _content(stores.root.snapshots / "overlay" / str(number) / "fs/opt/3")
    monkeypatch.setattr(unflushed, "boot_id", lambda: "another")
    monkeypatch.setattr(doubts, "apply_apart", lambda job, _passed: applied_again(job))
    assert backend.reusable(DIFF_ID) is None
    for name in ("on one", "on two"):
        with pytest.raises(DataLoss):
            backend.stat(name)
    doubts.settle_doubts(stores.root, lambda: None)
    assert {record_of(stores, name).id == number for name in ("on one", "on two")} == {is_right}
    assert tree_of(stores, "overlay", "on two", tmp_path / "mnt") == before
    assert backend.reusable(DIFF_ID)
    assert not [one for one in stores.check().findings if one.is_damage]


def test_what_is_flushed_with_a_reused_layer_is_no_more_in_doubt(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stores.snapshotter("overlay")
    stand(backend, "one", flush=False)
    stand(backend, "two")
    monkeypatch.setattr(unflushed, "boot_id", lambda: "another")
    assert backend.stat("on one")
    assert backend.stat("on two")
