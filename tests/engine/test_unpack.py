"""The unpacker: parallel layers, ordered commits, failures that leave nothing, on real workers."""

import hashlib
import os
import shutil
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import trio

from engine import failpoints
from engine.app import Engine, open_engine
from engine.content.store import ContentStore
from engine.errors import (
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    NotFound,
    Refused,
    ResourceExhausted,
)
from engine.images.states import parts_of
from engine.kv.schema import INGESTS, LEASE_ITEMS, LEASES, SMALL, SNAPSHOTS, TRASH
from engine.mount import mounted
from engine.oci.digest import Digest, digest_of
from engine.progress import Step
from engine.snapshots import Kind
from engine.testing.archives import archive, layout, member, pack
from engine.unpack.plan import missing_from
from engine.unpack.unpacker import Unpacked
from snapshotters.overlay import OverlaySnapshotter
from tests.conftest import AMD64, children
from tests.engine.image_files import LAYER as OCI_LAYER
from tests.engine.image_files import Files
from tests.support import BACKENDS, tree_of

pytestmark = pytest.mark.root

LAYERS = [
    archive(*(member(f"base/{n}", data=b"%d" % n) for n in range(50))),
    archive(member("base/.wh.1"), member("second", data=b"2" * 5000)),
    archive(member("third", data=b"3")),
]


def run(tmp_path: Path, work: object, *arguments: object) -> object:
    async def main() -> object:
        with trio.fail_after(60):
            async with open_engine(tmp_path / "root", platform=AMD64) as engine:
                return await work(engine, *arguments)  # type: ignore[operator]

    return trio.run(main)


def actives(engine: Engine) -> list[str]:
    return [
        info.key
        for backend in engine.stores.snapshotters()
        for info in backend.walk()
        if info.kind is Kind.ACTIVE
    ]


def folders(engine: Engine) -> list[Path]:
    found = list(engine.stores.root.snapshots.glob("*/*"))
    return found + list(engine.stores.root.trash.iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpacks_once(tmp_path: Path, backend: str) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        seen: list[Step] = []
        done = await engine.unpack(
            image.name, snapshotter=backend, report=lambda step, *_: seen.append(step)
        )
        assert (done.layers, done.applied, done.entries) == (3, 3, 53)
        assert {Step.UNPACK, Step.FLUSH} <= set(seen)
        again = await engine.unpack(image.name, snapshotter=backend)
        assert again == Unpacked(
            chain_id=done.chain_id,
            layers=3,
            applied=0,
            entries=0,
            bytes_unpacked=0,
            xattrs_left_out=0,
            mistyped=(),
        )
        assert not actives(engine)
        resolved = engine.stores.resolve(image.target)
        assert parts_of(engine.stores, resolved).unpacked == {backend: done.chain_id}
        for layer in resolved.layers:
            labels = engine.stores.content.info(layer.descriptor.key).labels
            assert labels["containerd.io/uncompressed"] == layer.diff_id

    run(tmp_path, work)


def test_only_missing_layers_are_applied(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        (below,) = (await engine.import_image(layout(tmp_path / "one", LAYERS[:2], tag="x/a:1"))).images
        (whole,) = (await engine.import_image(layout(tmp_path / "two", LAYERS, tag="x/b:1"))).images
        assert (await engine.unpack(below.name, snapshotter="overlay")).applied == 2
        assert (await engine.unpack(whole.name, snapshotter="overlay")).applied == 1

    run(tmp_path, work)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_up_09_up_20j_a_wrong_diff_id_stops_at_its_layer(tmp_path: Path, bad: int) -> None:
    diff_ids = [digest_of(layer) for layer in LAYERS]
    diff_ids[bad] = digest_of(b"something else")

    async def work(engine: Engine) -> None:
        (image,) = (
            await engine.import_image(layout(tmp_path / "image", LAYERS, diff_ids=diff_ids))
        ).images
        with pytest.raises(DigestMismatch):
            await engine.unpack(image.name, snapshotter="overlay")
        resolved = engine.stores.resolve(image.target)
        backend = engine.stores.snapshotter("overlay")
        assert {info.key for info in backend.walk()} == set(resolved.chain[:bad])
        assert parts_of(engine.stores, resolved).unpacked == {}
        assert len(folders(engine)) == bad

    run(tmp_path, work)


def test_diff_ids_may_be_sha512(tmp_path: Path) -> None:
    # Each is hashed with its own algorithm; the name of a stack of several is always sha256.
    def sha512(data: bytes) -> str:
        return f"sha512:{hashlib.sha512(data).hexdigest()}"

    mixed = [sha512(LAYERS[0]), digest_of(LAYERS[1]), sha512(LAYERS[2])]
    wrong = [sha512(LAYERS[0]), sha512(b"something else")]
    chain = [mixed[0]]
    for diff_id in mixed[1:]:
        chain.append(f"sha256:{hashlib.sha256(f'{chain[-1]} {diff_id}'.encode()).hexdigest()}")

    async def work(engine: Engine) -> None:
        image = layout(tmp_path / "image", LAYERS, diff_ids=mixed)
        (good,) = (await engine.import_image(image, name="x/good:1")).images
        done = await engine.unpack(good.name, snapshotter="overlay")
        assert done.chain_id == chain[-1]
        assert {info.key for info in engine.stores.snapshotter("overlay").walk()} == set(chain)
        image = layout(tmp_path / "wrong", LAYERS[:2], diff_ids=wrong)
        (bad,) = (await engine.import_image(image, name="x/bad:1")).images
        with pytest.raises(DigestMismatch, match=wrong[1]):
            await engine.unpack(bad.name, snapshotter="overlay")

    run(tmp_path, work)


def test_import_that_cannot_be_unpacked_leaves_nothing(tmp_path: Path) -> None:
    hostile = archive(member("a", "1", link="nowhere"))

    async def work(engine: Engine) -> None:
        with pytest.raises(Refused):
            await engine.import_image(
                layout(tmp_path / "image", [LAYERS[0], hostile]), snapshotter="overlay"
            )
        assert engine.stores.images.walk() == []
        assert not list(engine.stores.content.walk())
        assert engine.stores.content.statuses() == []
        assert folders(engine) == []

    run(tmp_path, work)


def test_the_same_layer_twice(tmp_path: Path) -> None:
    # By position, not by digest: what a layer means depends on what is below it (MS-27).
    layers = [
        archive(member("x", data=b"1")),
        archive(member("x", data=b"2")),
        archive(member("x", data=b"1")),
    ]

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", layers))).images
        for name in ("overlay", "copy"):
            mounts = await engine.prepare(f"container {name}", image.name, snapshotter=name)
            target = tmp_path / name
            target.mkdir()
            with mounted(mounts, target):
                assert (target / "x").read_bytes() == b"1"

    run(tmp_path, work)


def test_only_what_was_prepared_is_released_and_by_its_very_key(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        await engine.import_image(layout(tmp_path / "image", LAYERS), snapshotter="overlay")
        overlay = engine.stores.snapshotter("overlay")
        chains = {info.key for info in overlay.walk()}
        for chain in chains:
            with pytest.raises(NotFound, match="no snapshot"):
                await engine.release(chain[7:19])
        with pytest.raises(FailedPrecondition, match="is a layer"):
            await engine.release(max(chains))
        assert {info.key for info in overlay.walk()} == chains

    run(tmp_path, work)


def test_an_image_without_layers_is_an_empty_root(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (
            await engine.import_image(layout(tmp_path / "image", []), snapshotter="overlay")
        ).images
        done = await engine.unpack(image.name, snapshotter="overlay")
        assert (done.chain_id, done.layers) == ("", 0)
        assert await engine.prepare("container", image.name, snapshotter="overlay")
        await engine.release("container", snapshotter="overlay")

    run(tmp_path, work)


def test_a_missing_blob_is_named(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        lost = engine.stores.resolve(image.target).layers[1].descriptor.key
        engine.stores.content.delete(lost)
        with pytest.raises(NotFound, match=lost):
            await engine.unpack(image.name, snapshotter="overlay")
        assert not actives(engine)

    run(tmp_path, work)


@pytest.mark.parametrize("name", ["apply.entry", "apply.finish"])
def test_up_10_a_worker_that_dies_is_an_ordinary_error(tmp_path: Path, name: str) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS[:1]))).images
        with failpoints.armed(name, "kill"), pytest.raises(EngineError, match="signal 9"):
            await engine.unpack(image.name, snapshotter="overlay")
        assert folders(engine) == []
        # The pool has another worker for the next one.
        assert (await engine.unpack(image.name, snapshotter="overlay")).applied == 1

    run(tmp_path, work)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        with failpoints.armed("apply.entry", "enospc"), pytest.raises(ResourceExhausted):
            await engine.unpack(image.name, snapshotter="overlay")
        assert not actives(engine)
        assert (await engine.unpack(image.name, snapshotter="overlay")).layers == 3

    run(tmp_path, work)


MOMENTS = {
    "a layer begins": lambda step, _total, done: step is Step.UNPACK and not done,
    "a layer is applied": lambda step, total, done: step is Step.UNPACK and done == total,
    "a commit begins": lambda step, _total, done: step is Step.FLUSH and not done,
    "a commit is done": lambda step, total, done: step is Step.FLUSH and done == total,
}


@pytest.mark.parametrize(("moment", "nth"), list(zip(MOMENTS, [1, 2, 1, 2], strict=True)))
def test_up_20a_up_20b_cancelling_leaves_nothing(tmp_path: Path, moment: str, nth: int) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        seen = 0
        with trio.CancelScope() as scope:

            def cancel(step: Step, _item: str, total: int, done: int, /) -> None:
                nonlocal seen
                seen += MOMENTS[moment](step, total, done)
                if seen == nth:
                    scope.cancel()

            await engine.unpack(image.name, snapshotter="overlay", report=cancel)
        assert seen >= nth
        assert scope.cancelled_caught
        backend = engine.stores.snapshotter("overlay")
        chain = engine.stores.resolve(image.target).chain
        there = {info.key for info in backend.walk()}
        assert there == set(chain[: len(there)]), "a layer without those below it, or an active one"
        assert len(folders(engine)) == len(there)
        with engine.stores.root.meta.read() as txn:
            assert LEASES.scan(txn, "default") == []
            assert LEASE_ITEMS.scan(txn, "default") == []
        again = await engine.unpack(image.name, snapshotter="overlay")
        assert again.applied == len(chain) - len(there)
        assert {info.key for info in backend.walk()} == set(chain)

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("step", "unpacks"), [(Step.STORE, False), (Step.UNPACK, True), (Step.FLUSH, True)]
)
def test_cancelling_an_import_leaves_nothing(tmp_path: Path, step: Step, unpacks: bool) -> None:
    kept = archive(member("kept", data=b"k"))

    async def work(engine: Engine) -> None:
        (before,) = (await engine.import_image(layout(tmp_path / "kept", [kept], tag="x/kept:1"))).images
        blobs = {blob.digest for blob in engine.stores.content.walk()}
        with trio.CancelScope() as scope:

            def cancel(seen: Step, _item: str, _total: int, _done: int, /) -> None:
                if seen is not step:
                    return
                if step is Step.STORE:  # told on the import's thread
                    trio.from_thread.run_sync(scope.cancel)
                else:
                    scope.cancel()

            await engine.import_image(
                layout(tmp_path / "image", [kept, *LAYERS]),
                snapshotter="overlay" if unpacks else None,
                report=cancel,
            )
        assert scope.cancelled_caught
        stores = engine.stores
        assert [image.name for image in stores.images.walk()] == [before.name]
        assert {blob.digest for blob in stores.content.walk()} == blobs
        assert stores.content.statuses() == []
        assert folders(engine) == []
        with stores.root.meta.read() as txn:
            for table in (LEASES, LEASE_ITEMS, TRASH, SNAPSHOTS, INGESTS):
                assert table.survey(txn) == ([], []), table.name
            small = SMALL.count(txn)
        with stores.root.blobs.read() as txn:
            assert small + txn.raw.stat()["entries"] == len(blobs)

    run(tmp_path, work)


def test_a_backend_that_cannot_rebase_gets_its_parents_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(OverlaySnapshotter.capabilities, rebase=False)
    monkeypatch.setattr(OverlaySnapshotter, "capabilities", plain)
    order: list[tuple[str, str]] = []
    prepare = OverlaySnapshotter.prepare

    def watched(self: OverlaySnapshotter, key: str, parent: str = "", **rest: object) -> object:
        order.append((key.partition(" ")[2], parent))
        return prepare(self, key, parent, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OverlaySnapshotter, "prepare", watched)

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        await engine.unpack(image.name, snapshotter="overlay")
        chain = engine.stores.resolve(image.target).chain
        assert order == list(zip(chain, ["", *chain[:-1]], strict=True))
        tree = set(tree_of(engine.stores, "overlay", chain[-1], tmp_path / "mnt"))
        assert tree == {b"base", b"second", b"third"} | {b"base/%d" % n for n in range(50) if n != 1}

    run(tmp_path, work)


def test_ms_18_up_11_two_at_once_share_or_race_without_harm(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        results: list[str] = []

        async def one() -> None:
            done = await engine.unpack(image.name, snapshotter="overlay")
            results.append(done.chain_id)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
        assert len(set(results)) == 1
        assert len(results) == 4
        assert not actives(engine)
        assert len(folders(engine)) == 3

    run(tmp_path, work)


def test_xattrs_that_are_left_out_are_counted(tmp_path: Path) -> None:
    left_out = {b"SCHILY.xattr.trusted.x": b"1", b"SCHILY.xattr.security.y": b"1"}
    layer = archive(
        member("f", pax={**left_out, b"SCHILY.xattr.user.x": b"2"}),
        member("d/", "5", pax=left_out),
        member("l", "2", link="x", pax={b"SCHILY.xattr.user.x": b"2"}),
        # Some tools repeat them with each name of a file, where they mean nothing.
        member("g", "1", link="f", pax={**left_out, b"SCHILY.xattr.user.x": b"2"}),
        # An ACL as text, by star and bsdtar.
        member("acl", pax={b"SCHILY.acl.access": b"user::rw-,user:7:r--"}),
    )

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", [layer]))).images
        done = await engine.unpack(image.name, snapshotter="overlay")
        assert done.xattrs_left_out == 6

    run(tmp_path, work)


def test_cri_14_the_bytes_decide_how_a_layer_is_packed(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        for said, done in product(("none", "gzip", "zstd"), repeat=2):
            layer = archive(member(f"{said}-{done}"))
            (image,) = (await engine.import_image(_typed(tmp_path / "image", layer, said, done))).images
            note = f"packed with {done} by its bytes, {said} by its media type"
            if said != done:
                with pytest.raises(Refused, match=f"{note}; without --strict the bytes decide"):
                    await engine.unpack(image.name, snapshotter="overlay", strict=True)
                assert not folders(engine)
            unpacked = await engine.unpack(image.name, snapshotter="overlay", strict=said == done)
            assert unpacked.applied == 1
            assert [line.partition(": ")[2] for line in unpacked.mistyped] == [note] * (said != done)
            again = await engine.unpack(image.name, snapshotter="overlay")
            assert (again.applied, again.mistyped) == (0, unpacked.mistyped)
            if said != done:  # whatever is unpacked already
                with pytest.raises(Refused, match=note):
                    await engine.unpack(image.name, snapshotter="overlay", strict=True)
            engine.stores.images.remove(image.name)
            await engine.collect()

    run(tmp_path, work)


def test_four_bytes_of_a_layer_tell_how_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    def sniffed(self: ContentStore, digest: Digest, count: int) -> bytes:
        data = head(self, digest, count)
        looked_at.append(len(data))
        return data

    head = ContentStore.head
    monkeypatch.setattr(ContentStore, "head", sniffed)

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        await engine.unpack(image.name, snapshotter="overlay")
        assert looked_at == [4] * len(LAYERS)
        await engine.prepare("key", image.name, snapshotter="overlay")
        await engine.release("key", snapshotter="overlay")
        assert looked_at == [4] * len(LAYERS) * 2

    run(tmp_path, work)


def _typed(folder: Path, layer: bytes, said: str, done: str) -> Path:
    """Return a layout whose one layer is packed with `done` under the media type of `said`."""
    shutil.rmtree(folder, ignore_errors=True)
    files = Files()
    media_type = OCI_LAYER + pack(b"", said)[0]
    files.name(files.image([layer], layers=[files.blob(pack(layer, done)[1], media_type)]))
    return files.folder(folder)


def test_workers_end_with_their_engine(tmp_path: Path) -> None:
    pids: list[int] = []

    async def work(engine: Engine) -> None:
        (image,) = (await engine.import_image(layout(tmp_path / "image", LAYERS))).images
        await engine.unpack(image.name, snapshotter="overlay")
        pids.extend(children())
        assert pids

    run(tmp_path, work)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


def test_plan_asks_from_the_top() -> None:
    asked: list[str] = []

    def has(name: str) -> bool:
        asked.append(name)
        return name == "b"

    assert missing_from(["a", "b", "c", "d"], has) == 2  # type: ignore[list-item, arg-type]
    assert asked == ["d", "c", "b"]
    assert missing_from([], has) == 0  # type: ignore[arg-type]
