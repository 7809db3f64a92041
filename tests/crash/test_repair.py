"""A repair that dies at any point leaves a store that the next one completes."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import failpoints
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import TreeEntry, differences
from tests.command import dump, lamina
from tests.processes import Victim
from tests.support import tree_of

pytestmark = [pytest.mark.crash, pytest.mark.root]

BASE = archive(member("etc/", "5", mode=0o750), member("etc/passwd", data=b"root\n" * 100))
TOP = archive(member("etc/hosts", data=b"::1\n"), member("usr/x", data=os.urandom(100_000)))


def change_files(root: Path) -> None:
    for file in root.glob("snapshots/*/*/fs/etc/*"):
        file.write_bytes(b"changed")


def damage_layer(root: Path) -> None:
    with open_stores(root, "default", host_platform()) as stores:
        layer = stores.resolve(stores.images.get("a:1").target).manifest.layers[-1]
        number = stores.content.info(layer.key).number
        with stores.root.blobs.write() as txn:
            txn.raw.delete(number.to_bytes(8, "big") + bytes(4))


def orphan_bytes(root: Path) -> None:
    with open_stores(root, "default", host_platform()) as stores, stores.root.blobs.write() as txn:
        txn.raw.put((999).to_bytes(8, "big") + bytes(4), b"nobody's")


def orphan_folder(root: Path) -> None:
    (root / "snapshots/overlay/999/fs/x").mkdir(parents=True)


# Damage, where the repair dies, and which of its hits.
ROWS: list[tuple[Callable[[Path], None], str, int]] = [
    (change_files, "fsck.snapshot.prepared", 1),
    (change_files, "fsck.snapshot.applied", 1),
    (change_files, "snapshot.commit.settled", 1),
    (change_files, "snapshot.commit.flushed", 1),
    (change_files, "snapshot.replace.recorded", 2),
    (change_files, "trash.moved", 1),
    (damage_layer, "fsck.blob.dropped", 1),
    (damage_layer, "trash.emptied", 1),
    (orphan_bytes, "fsck.extents.removed", 1),
    (orphan_folder, "fsck.folder.moved", 1),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("repair")
    layout(top / "image", [BASE, TOP])
    lamina(top / "root", "import", "--snapshotter", "overlay", "--name", "a:1", top / "image")
    return top / "root"


def tree(root: Path) -> dict[bytes, TreeEntry]:
    with open_stores(root, "default", host_platform()) as stores:
        top = stores.resolve(stores.images.get("a:1").target).chain[-1]
        return tree_of(stores, "overlay", top, root.with_name("mnt"))


@pytest.mark.parametrize(("damage", "name", "nth"), ROWS)
def test_the_next_repair_completes_what_one_began(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], name: str, nth: int
) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", whole, root], check=True)
    before = tree(root)
    damage(root)
    code, messages = Victim(root, ["fsck", "--repair"], f"{name}=kill@{nth}").wait()
    assert code == -signal.SIGKILL, messages or "the point was not reached"
    is_lost = damage is damage_layer
    lamina(root, "fsck", "--repair", code=5 if is_lost else 0)
    if is_lost:
        lamina(root, "import", "--snapshotter", "overlay", "--name", "a:1", whole.parent / "image")
    lamina(root, "gc")
    lamina(root, "fsck")
    assert not differences(tree(root), before)
    left = dump(root)
    assert (left["ingests"], left["leases"], left["trash"]) == ([], [], [])
    assert len(left["folders"]) == len(left["snapshots"]) == 2
    shutil.rmtree(root)


def test_every_point_of_a_repair_is_met() -> None:
    repairs = {n for n in failpoints.NAMES if n.startswith(("fsck.", "snapshot.replace."))}
    assert repairs <= {name for _, name, _ in ROWS}
