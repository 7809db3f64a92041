"""Fixtures of the command line's tests: images, and stores that hold them, made once and copied."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.testing.archives import archive, layout, member
from tests.cli.container_places import Place, place_at
from tests.command import lamina, lamina_json
from tests.conftest import peer
from tests.running.images import image as running_image

BASE = archive(
    member("etc/", "5", mode=0o755),
    member("etc/name", data=b"lower\n"),
    member("etc/hidden", data=b"not to be seen\n"),
)
CHANGES = archive(member("etc/name", data=b"upper\n"), member("etc/.wh.hidden"))
OTHER = archive(member("other", data=b"of another image\n"))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout of two layers whose image is called app:1."""
    return layout(tmp_path_factory.mktemp("image") / "app", [BASE, CHANGES], tag="1")


@pytest.fixture(scope="session")
def other_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another image of the same name."""
    return layout(tmp_path_factory.mktemp("other") / "app", [OTHER], tag="1")


@pytest.fixture(scope="session")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the demo says it did."""
    unused = tmp_path_factory.mktemp("demo") / "unused"
    shown: Mapping[str, Any] = lamina_json(unused, "demo")
    assert not unused.exists()
    return shown


@pytest.fixture(scope="session")
def _stocked(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Path:
    root = tmp_path_factory.mktemp("stocked") / "root"
    lamina(root, "import", "--snapshotter", "overlay", image)
    return root


@pytest.fixture
def stocked(_stocked: Path, tmp_path: Path) -> Path:
    """A store with app:1, unpacked for overlay."""
    root = tmp_path / "root"
    # shutil has no whiteouts: they are devices.
    subprocess.run(["cp", "-a", _stocked, root], check=True)
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder to mount at."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout of an image that runs, where there is a runtime."""
    peer("runc")
    return running_image(tmp_path_factory.mktemp("image") / "busybox")


@pytest.fixture
def place(tmp_path: Path, busybox: Path) -> Iterator[Place]:
    """A store that has it."""
    with place_at(tmp_path / "root", busybox) as found:
        yield found
