"""Every state of an image is true: while it is pulled, after a crash, and when a part is gone.

That is CRI-16, whose questions docs/images.md answers.
"""

import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from engine import labels, limits
from engine.errors import EngineError
from engine.images.states import ImageState, State, Use, pulls, state_of
from engine.kv.schema import EXTENT
from engine.metadata import ledger
from engine.oci.platform import Platform
from engine.registry.client import open_client
from engine.registry.credentials import Credential, mark
from engine.root import open_root
from engine.stores import Stores
from engine.testing.fake_registry import FakeRegistry, cut, reset, respond, response
from tests.command import lamina, lamina_json
from tests.engine.image_files import AMD64
from tests.registry.asking import Served
from tests.registry.pulls import BIG, access, engine_at

pytestmark = pytest.mark.root

ALL = {Use.RUN, Use.UNPACK, Use.EXPORT}


def pulled(root: Path, served: Served, **options: Any) -> None:
    async def run() -> None:
        async with engine_at(root) as engine, open_client(access()) as client:
            await engine.pull(str(served.reference), client, **options)

    trio.run(run)


def pulling(root: Path) -> ImageState | None:
    with open_root(root) as opened:
        found = list(pulls(Stores(opened, "default", Platform(**AMD64))))
    assert len(found) <= 1
    return found[0] if found else None


def named(root: Path, served: Served) -> ImageState:
    with open_root(root) as opened:
        return state_of(Stores(opened, "default", Platform(**AMD64)), str(served.reference))


BEFORE_LAYERS = ("/manifests/sha256:", "config")


@pytest.mark.parametrize("stage", BEFORE_LAYERS)
def test_resolved(stage: str, tmp_path: Path, registry: FakeRegistry, served: Served) -> None:
    registry.plan(served.config.digest if stage == "config" else stage, respond(response(403)), times=9)
    with pytest.raises(EngineError):
        pulled(tmp_path, served)
    # Nothing came: nothing is to be gone on with.
    assert pulling(tmp_path) is None


@pytest.mark.crash
def test_cri_16_resolved_then_killed(tmp_path: Path, served: Served) -> None:
    words = ("pull", "--platform", "linux/amd64", "--no-unpack", served.reference)
    lamina(tmp_path, *words, code=-signal.SIGKILL, failpoints="pull.resolved=kill")
    found = pulling(tmp_path)
    assert found
    assert (found.state, found.target, found.puller) == (State.RESOLVED, served.manifest, "")
    assert lamina_json(tmp_path, "images") == []


def test_fetching_until_it_is_fetched(tmp_path: Path, registry: FakeRegistry, served: Served) -> None:
    registry.plan(served.layers[1].digest, cut(EXTENT + 5000))
    registry.plan(served.layers[1].digest, reset(), times=100)
    with pytest.raises(EngineError):
        pulled(tmp_path, served)
    found = pulling(tmp_path)
    assert found
    assert found.state == State.FETCHING
    assert EXTENT <= found.parts.there < found.parts.size
    assert found.parts.uses == set()
    told = lamina(tmp_path, "gc").stderr
    assert f"are kept for its next pull; `lamina leases rm {found.lease}`" in told
    registry._planned.clear()
    pulled(tmp_path, served)
    assert pulling(tmp_path) is None
    state = named(tmp_path, served)
    assert (state.state, state.parts.uses) == (State.FETCHED, {Use.UNPACK, Use.EXPORT})
    assert state.parts.there == state.parts.size == sum(layer.size for layer in served.layers)


def test_cri_16_unpacked_and_what_is_true_when_parts_are_gone(
    tmp_path: Path, served: Served, umask_0: None
) -> None:
    pulled(tmp_path, served, snapshotter="overlay")
    state = named(tmp_path, served)
    assert (state.state, state.parts.uses) == (State.UNPACKED, ALL)
    with open_root(tmp_path) as opened:
        stores = Stores(opened, "default", Platform(**AMD64))
        # Somebody deletes a layer's blob: what is unpacked can still be run.
        stores.content.delete(served.layers[1].key)
        parts = state_of(stores, str(served.reference)).parts
        assert parts.uses == {Use.RUN}
        assert parts.lost == (served.layers[1].digest,)
    (row,) = lamina_json(tmp_path, "images")
    assert (row["state"], row["uses"]) == ("unpacked", ["run"])
    assert served.layers[1].digest in row["error"]
    with open_root(tmp_path) as opened:
        stores = Stores(opened, "default", Platform(**AMD64))
        # And then a snapshot.
        backend = stores.snapshotter("overlay")
        backend.remove(parts.unpacked["overlay"])
        state = state_of(stores, str(served.reference))
        assert (state.state, state.parts.uses) == (State.INCOMPLETE, frozenset())
    (row,) = lamina_json(tmp_path, "images")
    assert (row["state"], row["uses"], bool(row["error"])) == ("incomplete", [], True)
    # A pull brings back what is missing, and no more.
    pulled(tmp_path, served, snapshotter="overlay")
    assert named(tmp_path, served).parts.uses == ALL


def test_another_images_layers_are_not_taken_for_its_own(
    tmp_path: Path, registry: FakeRegistry, served: Served, umask_0: None
) -> None:
    pulled(tmp_path, served, snapshotter="overlay")
    top = named(tmp_path, served).parts.unpacked["overlay"]
    other = Served(registry, (BIG,))
    pulled(tmp_path, other)
    key = labels.snapshot_ref("overlay")
    lamina(tmp_path, "content", "label", other.config.digest, f"{key}={top}")
    assert named(tmp_path, other).state == State.FETCHED
    assert lamina_json(tmp_path, "images")[0]["unpacked"] == {}


def test_dropped_blobs_are_no_damage(tmp_path: Path, served: Served, umask_0: None) -> None:
    pulled(tmp_path, served, snapshotter="overlay", keep_blobs=False)
    lamina(tmp_path, "gc")
    state = named(tmp_path, served)
    assert (state.state, state.parts.uses) == (State.UNPACKED, {Use.RUN})
    assert state.parts.missing
    assert not state.parts.lost
    (row,) = lamina_json(tmp_path, "images")
    assert (row["state"], row["uses"], "error" in row) == ("unpacked", ["run"], False)
    lamina(tmp_path, "fsck")
    lamina(tmp_path, "gc")
    assert named(tmp_path, served) == state


def test_dropped_blobs_are_missed_once_what_was_unpacked_is_gone(
    tmp_path: Path, served: Served, umask_0: None
) -> None:
    pulled(tmp_path, served, snapshotter="overlay", keep_blobs=False)
    lamina(tmp_path, "gc")
    with open_root(tmp_path) as opened:
        stores = Stores(opened, "default", Platform(**AMD64))
        top = state_of(stores, str(served.reference)).parts.unpacked["overlay"]
        stores.snapshotter("overlay").remove(top)
    state = named(tmp_path, served)
    assert (state.state, state.parts.uses) == (State.INCOMPLETE, frozenset())
    assert lamina_json(tmp_path, "images")[0]["error"]
    assert "pull it again" in lamina(tmp_path, "fsck", code=5).stdout
    pulled(tmp_path, served, snapshotter="overlay", keep_blobs=False)
    lamina(tmp_path, "fsck")
    assert named(tmp_path, served).state == State.UNPACKED


def test_an_image_of_no_layers_can_be_run(tmp_path: Path, registry: FakeRegistry) -> None:
    served = Served(registry, ())
    pulled(tmp_path, served)
    assert named(tmp_path, served).parts.uses == ALL


def test_r_16_who_pulled_is_recorded(tmp_path: Path, registry: FakeRegistry, served: Served) -> None:
    pulled(tmp_path, served)
    assert named(tmp_path, served).pulled_with == {"anyone"}
    mine = Credential("u", "s3cr3t")
    registry.realm, registry.user, registry.password = "basic", mine.user, mine.secret

    async def run() -> None:
        mine_only = access(credentials=lambda _: mine)
        async with engine_at(tmp_path) as engine, open_client(mine_only) as client:
            await engine.pull(str(served.reference), client)

    trio.run(run)
    digest = served.manifest.digest
    assert named(tmp_path, served).pulled_with == {"anyone", mark(mine, digest)}
    assert mark(Credential("u", "other"), digest) not in named(tmp_path, served).pulled_with
    assert b"s3cr3t" not in (tmp_path / "meta.lmdb" / "data.mdb").read_bytes()


def test_r_16_who_pulled_last_is_recorded_of_many(
    tmp_path: Path, served: Served, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PULLERS", 2)  # passwords of clouds last for hours
    registry.realm, registry.user = "basic", "u"
    mine = [Credential("u", f"{number}") for number in range(4)]
    for one in (mine[0], mine[1], mine[0], mine[2], mine[3], mine[2]):
        registry.password = one.secret

        async def run(one: Credential = one) -> None:
            with_mine = access(credentials=lambda _: one)
            async with engine_at(tmp_path) as engine, open_client(with_mine) as client:
                await engine.pull(str(served.reference), client)

        trio.run(run)
    marks = {mark(one, served.manifest.digest) for one in mine[2:]}
    assert named(tmp_path, served).pulled_with == marks


def test_what_a_pull_fetches_is_kept_while_it_is_at_work_and_a_day_longer(
    tmp_path: Path, served: Served
) -> None:
    pulled(tmp_path, served)
    with open_root(tmp_path) as opened:
        stores = Stores(opened, "default", Platform(**AMD64))
        lease = stores.pulls.begin(str(served.reference))
        stores.content.pin([served.manifest.key], lease)
        stores.images.remove(str(served.reference))
        _expire(stores, lease)
        stores.collect()
        assert stores.content.info(served.manifest.key)
        stores.pulls.leave(lease)
        stores.collect()
        assert stores.content.info(served.manifest.key)
        _expire(stores, lease)
        stores.collect()
        assert not stores.pulls.walk()
        assert not list(stores.content.walk())


def _expire(stores: Stores, lease: str) -> None:
    record = stores.leases.get(lease)
    about = {**record.labels, labels.GC_EXPIRE: "2001-01-01T00:00:00Z"}
    with stores.root.meta.write() as txn:
        ledger.put(txn, stores.namespace, msgspec.structs.replace(record, labels=about))
