"""A real containerd, started for the test alone, unpacks an image to the same tree."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.corpus import build
from engine.testing.trees import read_tree
from tests.command import lamina, lamina_json
from tests.compat.containerd import Containerd, running
from tests.compat.images import Tree, assert_same, our_tree, removed
from tests.conftest import peer

pytestmark = [pytest.mark.compat, pytest.mark.root]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with removed(tmp_path / "place") as folder:
        yield folder


@pytest.fixture
def containerd(place: Path) -> Iterator[Containerd]:
    with running(place / "containerd") as started:
        yield started


def _tree(containerd: Containerd, archive: Path, target: Path) -> Tree:
    containerd.ctr("images", "import", "--base-name", "small", "--snapshotter", "overlayfs", archive)
    with containerd.mounted("small:latest", target) as mount:
        return read_tree(mount)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_small_image_is_as_containerd_unpacks_it(
    containerd: Containerd, place: Path, compression: str
):
    for tool in ("debootstrap", "pigz", "zstd"):
        peer(tool)
    archive = build(place / "image", "small", compression)
    theirs = _tree(containerd, archive, place / "theirs")
    lamina(place / "root", "import", "--snapshotter", "overlay", archive)
    ours = our_tree(place / "root", "image", "overlay", place / "ours")
    assert_same(ours, theirs, "containerd")
    exported = place / "exported.tar"
    containerd.ctr("images", "export", exported, "small:latest")
    (row,) = lamina_json(place / "root", "import", exported)["images"]
    (first,) = (
        row for row in lamina_json(place / "root", "images") if row["name"].endswith("/image:latest")
    )
    assert (row["name"], row["digest"]) == ("docker.io/library/small:latest", first["digest"])
