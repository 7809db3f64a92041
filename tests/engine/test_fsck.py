"""Each kind of damage: how it comes, what a check says, what a repair does, and what is then so."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lmdb import verify

from engine import labels
from engine.content import extents
from engine.diff.apply import Applied, apply_layer
from engine.errors import NotFound
from engine.failpoints import armed
from engine.fsck.findings import Checked, Finding, What
from engine.kv import keys
from engine.kv.schema import (
    BLOBS,
    COUNTERS,
    EXTENT,
    HOLDINGS,
    MENTIONS,
    SMALL,
    SNAPSHOTS,
    TRASH,
    Blob,
    Small,
    Snapshot,
    Trash,
)
from engine.kv.table import Table
from engine.kv.verifying import page_troubles
from engine.metadata import ledger
from engine.metadata.namespaces import NamespaceStore
from engine.metadata.nodes import snapshot_node, token
from engine.mount import mounted
from engine.oci.digest import Digest, digest_of
from engine.progress import Step
from engine.root import Root
from engine.snapshots import Commit
from engine.stores import Stores
from engine.testing.archives import archive, member
from engine.unpack.jobs import ApplyJob
from tests.conftest import AMD64
from tests.engine.image_files import Files, import_image, state
from tests.inline import workers_inline
from tests.meddling import meddled
from tests.support import BACKENDS, tree_of

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

BASE = archive(
    member("etc/", "5", mode=0o750, uid=3),
    member("etc/passwd", data=b"root\n" * 100),
    member("etc/shadow", data=b"secret\n", mode=0o600),
    member("usr/bin/su", data=b"\x7fELF", mode=0o4755),
)
TOP = archive(member("etc/.wh.shadow"), member("etc/hosts", data=b"::1 localhost\n"))
BIG = archive(member("big", data=os.urandom(2 * EXTENT)))
NAME = "example.org/a:1"


@dataclass
class World:
    """A store with an image of three layers, unpacked for one backend."""

    stores: Stores
    backend: str
    folder: Path
    chain: list[str] = field(default_factory=list)

    @property
    def root(self) -> Root:
        return self.stores.root

    def check(self, *names: str, repair: bool = False) -> Checked:
        return self.stores.check(names, apply=self.apply if repair else None)

    def apply(self, job: ApplyJob) -> Applied:
        packed = [job.data] if job.data else extents.read(self.root.blobs, job.number, job.arrived.there)
        return apply_layer(packed, job.target, diff_id=Digest(job.diff_id))

    def record(self, layer: int) -> Snapshot:
        with self.root.meta.read() as txn:
            found = SNAPSHOTS.get(txn, self.backend, "default", self.chain[layer])
        assert found is not None
        return found

    def place(self, layer: int) -> Path:
        return self.root.snapshots / self.backend / str(self.record(layer).id)

    def tree(self, layer: int) -> Path:
        return self.place(layer) / "fs"

    def blob(self, data: bytes) -> Blob:
        return self.stores.content.info(digest_of(data))

    def config(self) -> Blob:
        image = self.stores.resolve(self.stores.images.get(NAME).target)
        return self.stores.content.info(image.manifest.config.key)

    def put_raw(self, table: str, value: bytes, *key: keys.Part) -> None:
        with self.root.meta.write() as txn:
            txn.raw.put(keys.encode(key), value, db=txn.databases[table])

    def put(self, record: Snapshot) -> None:
        """Write a snapshot's record past the room that writes them."""
        with self.root.meta.write() as txn:
            SNAPSHOTS.put(txn, record, self.backend, "default", record.key)


@pytest.fixture(params=BACKENDS)
def world(
    stores: Stores, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    files = Files()
    (tmp_path / "image").mkdir()
    source = files.name(files.image([BASE, TOP, BIG]), NAME).folder(tmp_path / "image")
    with workers_inline(monkeypatch, stores.root):
        import_image(stores, source, snapshotter=request.param)
        made = World(stores, request.param, tmp_path)
        made.chain = [str(key) for key in stores.resolve(stores.images.get(NAME).target).chain]
        yield made


# -- what can be wrong ---------------------------------------------------------------------------


def damage_extent(world: World, data: bytes) -> None:
    number = world.blob(data).number
    key = number.to_bytes(8, "big") + bytes(4)
    with world.root.meta.write() as meta, world.root.blobs.write() as blobs:
        small = SMALL.get(meta, number)
        value = bytearray(small.data if small else blobs.raw.get(key))
        value[len(value) // 2] ^= 1
        if small:
            SMALL.put(meta, Small(data=bytes(value)), number)
        else:
            blobs.raw.put(key, bytes(value))


def drop_extent(world: World, index: int) -> None:
    with world.root.blobs.write() as txn:
        txn.raw.delete(world.blob(BIG).number.to_bytes(8, "big") + index.to_bytes(4, "big"))


def lengthen(world: World) -> None:
    with world.root.blobs.write() as txn:
        txn.raw.put(world.blob(BIG).number.to_bytes(8, "big") + (3).to_bytes(4, "big"), b"more")


def orphan_extents(world: World) -> None:
    with world.root.blobs.write() as txn:
        txn.raw.put((999).to_bytes(8, "big") + bytes(4), b"nobody's")


def orphan_small(world: World) -> None:
    with world.root.meta.write() as txn:
        SMALL.put(txn, Small(data=b"nobody's"), 999)


def flip(world: World) -> None:
    file = world.tree(0) / "etc" / "passwd"
    info = file.stat()
    file.write_bytes(file.read_bytes().replace(b"root", b"r00t", 1))
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def orphan_folder(world: World) -> None:
    folder = world.root.snapshots / world.backend / "12345"
    (folder / "fs" / "x").mkdir(parents=True)
    (folder / "fs" / "x" / "link").symlink_to("/etc")


def dead_and_alive(world: World) -> None:
    number = world.record(1).id
    trash = Trash(kind="snapshot", backend=world.backend, number=number)
    with world.root.meta.write() as txn:
        TRASH.put(txn, trash, "snapshot", world.backend, number)


def dead_and_alive_bytes(world: World) -> None:
    number = world.blob(BASE).number
    with world.root.meta.write() as txn:
        TRASH.put(txn, Trash(kind="blob", backend="", number=number), "blob", "", number)


def stand_in_circle(world: World) -> None:
    world.put(msgspec.structs.replace(world.record(0), parent=world.chain[1]))


def forget_parent(world: World) -> None:
    with world.root.meta.write() as txn:
        SNAPSHOTS.delete(txn, world.backend, "default", world.chain[0])


def drop_layer(world: World) -> None:
    """As a store has it whose layers were removed by hand, or by a policy."""
    with world.root.meta.write() as txn:
        BLOBS.delete(txn, "default", digest_of(TOP))


def share_unnoted(world: World) -> None:
    with world.root.meta.write() as txn:
        blob = BLOBS.get(txn, "default", digest_of(TOP))
        assert blob
        ledger.put(txn, "other", blob)
        HOLDINGS.clear(txn)


def lower_counter(world: World) -> None:
    with world.root.meta.write() as txn:
        COUNTERS.set(txn, "snapshot", 1)


@dataclass(frozen=True)
class Row:
    """What is done, what is said of it, and what a repair then does ("" if nothing can be done)."""

    do: Callable[[World], object]
    what: What
    said: str
    repair: str
    left: int = 0
    """How many things are damaged still when it was repaired."""


ROWS: dict[str, Row] = {
    "a flipped byte in a layer's blob": Row(
        lambda w: damage_extent(w, BASE),
        What.BLOB,
        "its bytes are others; images that need it: example.org/a:1",
        "dropped; import",
        1,
    ),
    "an extent is missing": Row(
        lambda w: drop_extent(w, 0), What.BLOB, "bytes of it are missing", "dropped", 1
    ),
    "the last extent is missing": Row(
        lambda w: drop_extent(w, 2), What.BLOB, "bytes of it are missing", "dropped", 1
    ),
    "an extent more": Row(lengthen, What.BLOB, "bytes, not", "dropped", 1),
    "a flipped byte in a large blob": Row(
        lambda w: damage_extent(w, BIG), What.BLOB, "its bytes are others", "dropped", 1
    ),
    "a small blob that cannot be read": Row(
        lambda w: w.put_raw("small", b"\xc1", w.blob(TOP).number),
        What.BLOB,
        "bytes of it are missing",
        "dropped",
        1,
    ),
    "small bytes of no record": Row(orphan_small, What.EXTENTS, "8 bytes that no record has", "removed"),
    "bytes of no record": Row(orphan_extents, What.EXTENTS, "8 bytes that no record has", "removed"),
    "a flipped byte in a snapshot": Row(
        flip, What.SNAPSHOT, "/etc/passwd changed (content)", "applied again"
    ),
    "a file of a snapshot is missing": Row(
        lambda w: (w.tree(0) / "usr/bin/su").unlink(),
        What.SNAPSHOT,
        "/usr/bin/su missing",
        "applied again",
    ),
    "a file more in a snapshot": Row(
        lambda w: (w.tree(2) / "more").touch(), What.SNAPSHOT, "/more added", "applied again"
    ),
    "what an upper layer has": Row(
        lambda w: (w.tree(1) / "etc/hosts").write_bytes(b"elsewhere"),
        What.SNAPSHOT,
        "/etc/hosts changed",
        "applied again",
    ),
    "a snapshot has no tree": Row(
        lambda w: shutil.rmtree(w.tree(0)), What.SNAPSHOT, "there is no folder", "applied again"
    ),
    "a snapshot has no folder": Row(
        lambda w: shutil.rmtree(w.place(2)), What.SNAPSHOT, "there is no folder", "applied again"
    ),
    "a folder of no record": Row(orphan_folder, What.FOLDER, "no record has it", "removed"),
    "trash of no record": Row(
        lambda w: (w.root.trash / f"{w.backend}-777" / "fs").mkdir(parents=True),
        What.TRASH,
        "no record says that it is to be deleted",
        "removed",
    ),
    "a snapshot is about to be deleted": Row(
        dead_and_alive, What.TRASH, "a record has it", "it is not to be deleted any more"
    ),
    "bytes are about to be deleted": Row(
        dead_and_alive_bytes, What.TRASH, "a record has it", "it is not to be deleted any more"
    ),
    "a counter that gives numbers twice": Row(
        lower_counter, What.COUNTER, "it is at 1, and 3 is in use", "it goes on after 3"
    ),
    "nobody is noted as holding": Row(
        lambda w: clear(w, MENTIONS.name), What.EDGE, "it is not noted right", "noted anew"
    ),
    "nobody's bytes": Row(share_unnoted, What.EDGE, "it is not noted right", "noted anew"),
    "held by what is not": Row(
        lambda w: w.put_raw("mentions", b"\xff", "default", b"x" * 16, "label", b"y" * 16),
        What.EDGE,
        "1 mentions that no record has",
        "noted anew",
    ),
    "an image's record": Row(
        lambda w: w.put_raw("images", b"\xff", "default", NAME),
        What.RECORD,
        "a record of images cannot be read",
        "",
        1,
    ),
    "a snapshot's record": Row(
        lambda w: w.put_raw("snapshots", b"\xff", w.backend, "default", w.chain[2]),
        What.RECORD,
        "a record of snapshots cannot be read",
        "",
        1,
    ),
    "a record under another name": Row(
        lambda w: w.put_raw(
            "snapshots", msgspec.msgpack.encode(w.record(2)), w.backend, "default", "another"
        ),
        What.RECORD,
        "it is stored under another name",
        "",
        1,
    ),
    "a mark": Row(
        lambda w: w.put_raw("marks", b"\xff", "default"),
        What.RECORD,
        "a record of marks cannot be read",
        "removed",
    ),
    "what was touched": Row(
        lambda w: w.put_raw("touched", b"\xff", "default", b"x" * 16),
        What.RECORD,
        "a record of touched cannot be read",
        "removed",
    ),
    "what belongs to a lease that is gone": Row(
        lambda w: w.put_raw("lease_items", b"\xff", "default", "gone", "content", "", "x"),
        What.RECORD,
        "cannot be read",
        "removed",
    ),
    "a record of trash": Row(
        lambda w: w.put_raw("trash", b"\xff", "snapshot", w.backend, 999),
        What.RECORD,
        "a record of trash cannot be read",
        "removed",
    ),
    "a parent is missing": Row(forget_parent, What.SNAPSHOT, "its parent", "", 2),
    "a circle of parents": Row(stand_in_circle, What.SNAPSHOT, "in a circle", "", 3),
}


def clear(world: World, table: str) -> None:
    with world.root.meta.write() as txn:
        txn.raw.drop(txn.databases[table], delete=False)


def damage(checked: Checked) -> list[Finding]:
    return [finding for finding in checked.findings if finding.is_damage]


def cases() -> list[tuple[str, str]]:
    """Return backends and kinds of damage: of what no backend has a part in, once."""
    of_backends = {What.SNAPSHOT, What.FOLDER}
    return [
        (name, kind)
        for kind, row in ROWS.items()
        for name in (BACKENDS if row.what in of_backends else BACKENDS[:1])
    ]


@pytest.mark.parametrize(("world", "kind"), cases(), indirect=["world"])
def test_damage_is_told_and_mended(world: World, kind: str) -> None:
    row = ROWS[kind]
    assert damage(world.check()) == []
    row.do(world)
    before = state(world.stores)
    told = world.check()
    assert state(world.stores) == before, "a check changes nothing"
    found = [finding for finding in told.left if finding.what is row.what and row.said in finding.detail]
    assert found, told.left
    mended = world.check(repair=True)
    done = [one for one in mended.findings if one.what is row.what and row.said in one.detail]
    assert done[0].done.startswith(row.repair) if row.repair else not done[0].done
    assert len(world.check().left) == row.left, world.check().left
    if not row.left:
        assert damage(world.check()) == []
        assert world.stores.collect().errors == []
        assert damage(world.check()) == []


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_wrong_with_an_empty_store(stores: Stores, name: str) -> None:
    stores.snapshotter(name)
    checked = stores.check()
    assert checked.findings == []
    assert checked.counts.records == 0


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_what_is_noted_stays_while_a_record_cannot_be_read(world: World) -> None:
    """Nobody else knows what it names."""
    with world.root.meta.write() as txn:  # not one of the image's own: those nobody can tell any more
        MENTIONS.clear(txn, "default", token(snapshot_node("overlay", world.chain[0])))
    world.put_raw("images", b"\xff", "default", NAME)
    with world.root.meta.read() as txn:
        before = MENTIONS.count(txn)
    mended = world.check(repair=True)
    assert {finding.what for finding in mended.left} == {What.EDGE, What.RECORD}
    with world.root.meta.read() as txn:
        assert MENTIONS.count(txn) == before


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_trash_is_of_no_namespace(world: World) -> None:
    world.put_raw("trash", b"\xff", "snapshot", "overlay", 999)
    (told,) = damage(world.check())
    assert (told.namespace, told.snapshotter) == ("", "overlay")


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_what_damaged_trash_was_about_is_an_orphan(world: World) -> None:
    number = world.record(2).id
    backend = world.stores.snapshotter("overlay")
    world.stores.images.remove(NAME)
    assert backend.remove(world.chain[2]) == number
    world.put_raw("trash", b"\xff", "snapshot", "overlay", number)
    (told,) = damage(world.check(repair=True))
    assert told.what is What.RECORD
    (told,) = damage(world.check(repair=True))
    assert (told.what, told.done) == (What.FOLDER, "removed")
    assert damage(world.check()) == []


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_orphans_are_looked_for_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(900, 905):
        (world.root.snapshots / "overlay" / str(number)).mkdir()
        (world.root.trash / f"overlay-{number + 100}").mkdir()
        with world.root.blobs.write() as txn:
            txn.raw.put(number.to_bytes(8, "big") + bytes(4), b"nobody's")
    looks: list[str] = []
    real = Table.survey

    def survey(table: Any, txn: Any, *prefix: Any) -> Any:
        looks.append(table.name)
        return real(table, txn, *prefix)

    monkeypatch.setattr(Table, "survey", survey)
    assert len(world.check(repair=True).findings) == 15
    assert looks.count("blobs") == 1
    assert looks.count("snapshots") == 2
    assert world.check().findings == []


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_how_far_it_is_is_told(world: World) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def report(step: Step, item: str, total: int, done: int) -> None:
        assert step is Step.CHECK
        told.setdefault(item, []).append((total, done))

    checked = world.stores.check(report=report)
    assert list(told) == ["blobs", "snapshots"]
    for steps in told.values():
        assert len(steps) > 2
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    assert told["blobs"][-1][0] == checked.counts.blob_bytes


# -- repairs ---------------------------------------------------------------------------------------


def test_a_mended_tree_is_what_it_was(world: World) -> None:
    before = tree_of(world.stores, world.backend, world.chain[2], world.folder / "mnt")
    ids = [world.record(n).id for n in range(3)]
    flip(world)
    (world.tree(1) / "etc/hosts").unlink()
    shutil.rmtree(world.tree(2))
    assert len(world.check(repair=True).findings) == 3
    assert tree_of(world.stores, world.backend, world.chain[2], world.folder / "mnt") == before
    after = [world.record(n) for n in range(3)]
    assert not {record.id for record in after}.intersection(ids)
    assert [record.parent for record in after] == ["", *world.chain[:2]]
    assert all(labels.DIFF_ID in record.labels for record in after)
    folders = {int(path.name) for path in (world.root.snapshots / world.backend).iterdir()}
    assert folders == {record.id for record in after}
    assert list(world.root.trash.iterdir()) == []


def test_what_stands_on_a_damaged_snapshot_is_not_guessed(world: World) -> None:
    """What an upper layer hides and inherits follows from below: that is told once that is whole."""
    shutil.rmtree(world.tree(0) / "etc")
    told = [finding for finding in world.check().findings if finding.is_damage]
    assert [finding.name for finding in told] == [world.chain[0]]
    mended = world.check(repair=True)
    assert [finding.name for finding in mended.findings if finding.done] == [world.chain[0]]
    assert world.check().findings == []


@pytest.mark.parametrize("world", ["overlay", "copy"], indirect=True)
def test_what_is_mounted_keeps_its_files(stores: Stores, world: World) -> None:
    backend = stores.snapshotter(world.backend)
    backend.prepare("running", world.chain[2])
    flip(world)
    target = world.folder / "mnt"
    target.mkdir()
    before = world.place(0)
    with mounted(backend.mounts("running"), target):
        found = world.check(repair=True)
        if world.backend == "overlay":  # a copy has files of its own
            (waits,) = found.findings
            assert "unmount that first" in waits.waits
            assert world.place(0) == before
            assert found.left
        (target / "etc/hosts").read_bytes()
    assert world.check(repair=True).left == []
    assert world.check().findings == []
    with mounted(backend.mounts("running"), target):
        assert (target / "etc/passwd").read_bytes() == b"root\n" * 100


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_a_mount_that_comes_while_files_go_keeps_them(world: World) -> None:
    """Someone had the path already; the table was read before he mounted."""
    stores = world.stores
    backend = stores.snapshotter("overlay")
    mounts = backend.prepare("running", world.chain[1])
    flip(world)
    target = world.folder / "mnt"
    target.mkdir()
    old = world.place(0)
    real = Path.rename
    inside: list[object] = []

    def late(path: Path, other: Path) -> Path:
        if path == old and not inside:
            inside.append(block := mounted(mounts, target))
            block.__enter__()
        return real(path, other)

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Path, "rename", late)
        mended = world.check(repair=True)
    try:
        assert "stay in" in mended.findings[0].done
        assert (target / "etc/passwd").read_bytes().startswith(b"r00t")  # what it mounted
        assert stores.collect().left, "the files stay while it is mounted"
    finally:
        inside[0].__exit__(None, None, None)  # type: ignore[attr-defined]
    assert stores.collect().left == []
    assert world.check().findings == []


def test_without_its_layer_a_snapshot_is_checked_by_attributes(world: World) -> None:
    drop_layer(world)
    found = [f for f in world.check().findings if f.what is What.SNAPSHOT]
    assert [(f.name, f.is_damage) for f in found] == [(world.chain[1], False)]
    assert "checked by attributes only" in found[0].detail
    (world.tree(1) / "more").touch()
    found = [f for f in world.check(repair=True).left if f.what is What.SNAPSHOT]
    assert "files and folders, not" in found[0].detail


def test_what_was_committed_by_hand_is_checked_by_attributes(world: World) -> None:
    backend = world.stores.snapshotter(world.backend)
    backend.prepare("mine", world.chain[2])
    (world.root.snapshots / world.backend).joinpath(
        str(max(int(p.name) for p in (world.root.snapshots / world.backend).iterdir())), "fs", "x"
    ).touch()
    backend.commit(Commit(name="by hand", key="mine"))
    (note,) = world.check().findings
    assert (note.name, note.is_damage) == ("by hand", False)
    backend.prepare("active", "by hand")
    shutil.rmtree(world.root.snapshots / world.backend)
    assert len(world.check().left) == 5


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_a_blob_that_was_dropped_comes_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_extent(world, TOP)
    told = world.check(repair=True)
    assert [f.what for f in told.left] == [What.IMAGE]
    assert "import or pull it again" in told.left[0].detail
    import_image(world.stores, world.folder / "image")
    assert world.check().findings == []


def test_once_a_layer_is_here_again_its_snapshot_is_mended(world: World) -> None:
    damage_extent(world, TOP)
    hosts = world.tree(1) / "etc/hosts"
    hosts.write_bytes(b"elsewhere")
    told = world.check(repair=True)
    assert told.counts.by_attributes == 1
    names = [f.name for f in told.left if f.what is What.SNAPSHOT]
    if world.backend == "copy":  # it has what its parent had, and nobody can tell which is right
        assert names == [world.chain[2]]
        assert "the layer of what it stands on is not here" in told.left[-1].detail
        assert (world.tree(2) / "etc/hosts").read_bytes() == b"::1 localhost\n"
    else:
        assert names == []
    import_image(world.stores, world.folder / "image")
    mended = world.check(repair=True)
    assert [(f.name, bool(f.done)) for f in mended.findings] == [(world.chain[1], True)]
    assert (world.tree(1) / "etc/hosts").read_bytes() == b"::1 localhost\n"
    assert world.check().findings == []


def test_a_repair_that_fails_late_says_why(world: World) -> None:
    """The other snapshot has been replaced by then, and nothing is left to be undone."""
    (world.tree(2) / "more").touch()
    with armed("snapshot.replace.recorded", "error"):
        (told,) = world.check(repair=True).findings
    assert "failpoint" in told.waits
    assert world.check().left == []


def test_a_layer_that_is_applied_again_is_held(world: World) -> None:
    (world.tree(2) / "more").touch()

    verified: list[int] = []

    def apply(job: ApplyJob) -> Applied:
        world.stores.images.remove(NAME)
        world.stores.collect()
        verified.append(world.stores.content.verify(digest_of(BIG)))
        return world.apply(job)

    world.stores.check(apply=apply)
    assert verified == [len(BIG)]


def test_what_is_lost_for_good_is_told(world: World) -> None:
    backend = world.stores.snapshotter(world.backend)
    backend.prepare("active", world.chain[2])
    newest = max((world.root.snapshots / world.backend).iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    (told,) = world.check(repair=True).left
    assert (told.name, told.done, told.waits) == ("active", "", "")
    assert "what was written there is lost" in told.detail


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_of_two_namespaces_that_share_bytes_both_lose_them(world: World) -> None:
    other = Stores(world.root, "other", AMD64)
    import_image(other, world.folder / "image")
    damage_extent(world, BASE)
    assert other.content.info(digest_of(BASE)).number == world.blob(BASE).number
    world.check(repair=True)
    for stores in (world.stores, other):
        with pytest.raises(NotFound):
            stores.content.info(digest_of(BASE))


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_of_two_that_share_nothing_only_one_loses_a_blob(world: World) -> None:
    """The broken one's namespace sorts behind the whole one's, and both have the same digests."""
    NamespaceStore(world.root.meta).create("other", isolated=True)
    other = Stores(world.root, "other", AMD64)
    import_image(other, world.folder / "image")
    assert other.content.info(digest_of(BIG)).number != world.blob(BIG).number
    damage_extent(World(other, world.backend, world.folder), BIG)
    other.images.remove(NAME)
    (told,) = damage(world.check())
    assert (told.namespace, told.name) == ("other", digest_of(BIG))
    assert "images that need it: none" in told.detail
    (mended,) = damage(world.check(repair=True))
    assert mended.done.startswith("dropped")
    assert damage(world.check()) == []
    world.stores.content.verify(digest_of(BIG))


def test_only_the_images_that_are_named(world: World) -> None:
    files = Files()
    (world.folder / "second").mkdir()
    layer = archive(member("second", data=b"2"))
    source = files.name(files.image([BASE, layer]), "example.org/b:1").folder(world.folder / "second")
    import_image(world.stores, source, snapshotter=world.backend)
    (world.tree(2) / "more").touch()
    orphan_folder(world)
    assert world.check("example.org/b:1").findings == []
    (found,) = world.check(NAME).findings
    assert found.name == world.chain[2]
    assert world.check("example.org/b:1").counts.snapshots == 2


def miscount(world: World) -> None:
    """Let the tree of a table, which LMDB notes behind the table's name, have an entry more."""
    file = world.root.path / "meta.lmdb/data.mdb"
    data = file.read_bytes()
    with file.open("r+b") as opened:
        for found in re.finditer(b"clocks\\0{4}", data):  # MDB_db: the count of entries is at 32
            opened.seek(found.start() + len("clocks") + 32)
            opened.write((7).to_bytes(8, "little"))


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_damaged_pages_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.stores.collect()
    miscount(world)
    (told,) = damage(world.check(repair=True))
    assert (told.what, told.name, told.done) == (What.PAGES, "meta.lmdb", "")
    assert "`lamina compact`" in told.detail
    assert world.check(NAME).findings == [], "in a full check only"
    monkeypatch.setattr("engine.limits.VERIFIED_PAGES", 1)
    assert world.check().findings == []


@pytest.mark.parametrize("world", ["overlay"], indirect=True)
def test_pages_that_change_meanwhile_are_not_judged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.verify

    def beside(path: str) -> list[str]:
        world.stores.images.remove(NAME)
        return [*real(path), "torn"]

    monkeypatch.setattr(verify, "verify", beside)
    assert page_troubles(world.root.meta) is None


# -- beside others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "repair"), [("overlay", False), ("copy", True)], indirect=["world"])
def test_what_goes_meanwhile_is_no_damage(
    world: World, monkeypatch: pytest.MonkeyPatch, repair: bool
) -> None:
    """The image is removed and collected, before each of the check's transactions in turn."""
    with meddled(monkeypatch, world.root.meta, lambda _number: None) as passed:
        world.check(repair=repair)
    for number in range(0, len(passed), 5):
        image = world.stores.images.walk()

        def remove(at: int, when: int = number) -> None:
            if at == when:
                world.stores.images.remove(NAME)
                world.stores.collect()

        with meddled(monkeypatch, world.root.meta, remove):
            assert damage(world.check(repair=repair)) == [], number
        if image and not world.stores.images.walk():
            import_image(world.stores, world.folder / "image", snapshotter=world.backend)


def test_only_what_the_engine_writes_is_a_snapshots_folder(world: World) -> None:
    backend, trash = world.root.snapshots / world.backend, world.root.trash
    number = world.record(0).id
    strange = [backend / name for name in ("²", f"0{number}", "٢", "+1", " 1")]
    strange += [world.root.snapshots / "unknown", trash / f"{world.backend}-³"]
    for folder in strange:
        (folder / "below").mkdir(parents=True)
    links = [backend / "link", world.root.snapshots / "link", trash / "link"]
    files = [backend / "file", world.root.snapshots / "file"]
    for link in links:
        link.symlink_to("nowhere")
    for file in files:
        file.touch()
    placed = sorted(str(path.relative_to(world.root.path)) for path in (*strange, *links, *files))
    found = world.check().findings
    assert sorted(finding.name for finding in found) == placed
    assert {finding.done for finding in world.check(repair=True).findings} == {"removed"}
    assert world.check().findings == []


@pytest.mark.parametrize("leads_to", ["precious", "nowhere"])
def test_a_link_in_place_of_a_snapshots_folder_goes_and_is_not_followed(
    world: World, leads_to: str
) -> None:
    precious = world.folder / "precious"
    (precious / "below").mkdir(parents=True)
    place = world.place(2)
    shutil.rmtree(place)
    place.symlink_to(world.folder / leads_to)
    world.check(repair=True)
    world.stores.images.remove(NAME)
    collected = world.stores.collect()
    assert (collected.left, collected.errors) == ([], [])
    assert list(world.root.trash.iterdir()) == []
    assert not os.path.lexists(place)
    assert (precious / "below").is_dir()


def test_an_ingest_in_progress_is_nothing_to_tell_of(world: World) -> None:
    with world.stores.content.ingest("x", lease="", expected=digest_of(b"to come"), total=None):
        assert world.check().findings == []
