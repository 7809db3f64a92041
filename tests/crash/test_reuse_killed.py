"""A process that dies while it reuses a layer leaves nothing behind, and the layer to the others."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.images.states import parts_of
from engine.mount import Mount, mounted
from engine.snapshots import Kind
from engine.stores import Stores, host_platform, open_stores
from engine.testing.archives import archive, layout, member
from engine.testing.trees import TreeEntry
from tests.command import dump, lamina
from tests.processes import Victim
from tests.support import tree_of

pytestmark = [pytest.mark.crash, pytest.mark.root]

_BASES = {
    name: archive(member("etc/", "5", mode=mode), member("etc/old", data=name.encode()))
    for name, mode in (("one", 0o755), ("like", 0o755), ("odd", 0o700))
}
_UPPER = [archive(member("etc/new", data=b"x" * 9000)), archive(member("etc/.wh.old"), member("b/c"))]
_CASES = (  # base, point, and who dies there: a worker is an ordinary error
    ("like", "snapshot.prepare.recorded", 2, -signal.SIGKILL),
    ("like", "snapshot.commit.settled", 1, 7),
    ("odd", "snapshot.commit.settled", 1, 7),
    ("like", "snapshot.commit.recorded", 1, -signal.SIGKILL),
    ("like", "trash.moved", 1, -signal.SIGKILL),
)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "memory").mkdir()
    with mounted([Mount(type="tmpfs", source="tmpfs", options=["size=64m"])], tmp_path / "memory"):
        yield tmp_path / "memory" / "root"


def _tree(stores: Stores, name: str, target: Path) -> dict[bytes, TreeEntry]:
    top = parts_of(stores, stores.resolve(stores.images.get(name).target)).unpacked["overlay"]
    return tree_of(stores, "overlay", top, target)


@pytest.mark.parametrize(("base", "point", "nth", "code"), _CASES)
def test_who_dies_while_reusing_takes_nothing_along(
    tmp_path: Path, root: Path, base: str, point: str, nth: int, code: int
) -> None:
    for name in ("one", base):
        source = layout(tmp_path / name, [_BASES[name], *_UPPER], tag="1")
        more = ["--snapshotter", "overlay"] if name == "one" else ["--no-unpack"]
        lamina(root, "import", source, *more)
    command = ["unpack", f"{base}:1", "--snapshotter", "overlay"]
    found, messages = Victim(root, command, f"{point}=kill@{nth}").wait()
    assert found == code, messages or "the point was not reached"
    with open_stores(root, "default", host_platform()) as stores:
        stores.collect()
        infos = list(stores.snapshotter("overlay").walk())
        assert {info.kind for info in infos} == {Kind.COMMITTED}
        assert not stores.check().findings
        before = _tree(stores, "one:1", tmp_path / "mnt")
    lamina(root, *command)
    with open_stores(root, "default", host_platform()) as stores:
        after = _tree(stores, f"{base}:1", tmp_path / "mnt")
        assert _tree(stores, "one:1", tmp_path / "mnt") == before
        assert after.keys() == before.keys() == {b"b", b"b/c", b"etc", b"etc/new"}
        assert after[b"etc/new"] == before[b"etc/new"]
        assert not stores.check().findings
        for name in ("one:1", f"{base}:1"):
            stores.images.remove(name)
        stores.collect()
    assert not {table for table, records in dump(root).items() if records}
