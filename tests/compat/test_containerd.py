"""A real containerd, started for the test alone, unpacks an image to the same tree."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.corpus import build
from engine.mount import deactivate
from engine.testing.trees import read_tree
from tests.command import lamina, lamina_json
from tests.compat.images import Tree, assert_same, our_tree, removed, run
from tests.conftest import peer
from tests.processes import until

pytestmark = [pytest.mark.compat, pytest.mark.root]

_CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/ttrpc"
[debug]
  level = "error"
"""


@dataclass(frozen=True)
class Containerd:
    """A running containerd and the client that talks to it."""

    folder: Path

    def ctr(self, *words: object) -> str:
        """Run a command of its client."""
        return run(peer("ctr"), "--address", self.folder / "socket", *words)

    @contextmanager
    def mounted(self, image: str, target: Path) -> Iterator[Path]:
        """Mount an image read-only for the length of a block."""
        target.mkdir()
        self.ctr("images", "mount", image, target)
        try:
            yield target
        finally:
            deactivate(target)
            self.ctr("snapshots", "rm", target)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with removed(tmp_path / "place") as folder:
        yield folder


@pytest.fixture
def containerd(place: Path) -> Iterator[Containerd]:
    folder = place / "containerd"
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([peer("containerd"), "--config", config], stdout=log, stderr=log)
    try:
        started = Containerd(folder)
        until(lambda: (folder / "socket").exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield started
    finally:
        process.terminate()
        process.wait(timeout=20)


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
