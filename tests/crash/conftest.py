"""Fixtures of the crash tests: one image, and roots to start from, made once."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.mount import Mount, mounted
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.command import lamina
from tests.crash.harness import Case
from tests.support import tree_of

_BIG = 10 << 20  # more than one write to the store, so that a kill can come between two

_MEMORY = Mount(type="tmpfs", source="tmpfs", options=["size=512m"])


def _layers() -> list[bytes]:
    """Return three layers of 21 MB and 1,000 entries in all; random bytes do not pack."""
    source = random.Random("layers")

    def folder(name: str, files: int, largest: int) -> list[bytes]:
        members = [
            member(f"{name}/{number:04}", data=source.randbytes(source.randrange(largest)))
            for number in range(files)
        ]
        return [member(f"{name}/", "5", mode=0o750), *members]

    base = folder("base", 400, 30_000)
    middle = [*folder("middle", 400, 20_000), member("middle/big", data=source.randbytes(_BIG))]
    top = [
        *folder("top", 200, 4_000),
        member("base/.wh.0001"),
        member("middle/.wh..wh..opq"),
        member("middle/only", data=b"left\n"),
        member("top/linked", "1", link="top/0000"),
        member("implied/file", data=b"in a folder without an entry\n"),
    ]
    return [archive(*base), archive(*middle), archive(*top)]


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    top = tmp_path_factory.mktemp("crash")
    source = layout(top / "image", _layers())
    imported, unpacked = top / "imported", top / "unpacked"
    lamina(imported, "import", "--no-unpack", source)
    lamina(unpacked, "import", "--snapshotter", "overlay", source)
    with open_stores(unpacked, "default", host_platform()) as stores:
        image = stores.resolve(stores.images.get("image").target)
        tree = tree_of(stores, "overlay", image.chain[-1], top / "mnt")
        stores.images.remove("image")
    assert len(tree) > 600
    made = Case(source, imported, unpacked, tree, {})
    (top / "memory").mkdir()
    with mounted([_MEMORY], top / "memory"):
        for command in ("import", "unpack"):
            root = top / "memory" / command
            copy_template(made, command, root)
            before = written(root.parent)
            lamina(root, *made.arguments(command))
            made.growth[command] = written(root.parent) - before
    yield made
    shutil.rmtree(top)


def written(folder: Path) -> int:
    """Return what is on the file system of a folder, in blocks; an inode counts as one of them."""
    disk = os.statvfs(folder)
    return disk.f_blocks - disk.f_bfree + disk.f_files - disk.f_ffree


def copy_template(case: Case, command: str, root: Path) -> None:
    template = case.template(command)
    if template is None:
        root.mkdir(mode=0o700)
    else:
        # shutil has no whiteouts: they are devices.
        subprocess.run(["cp", "-a", template, root], check=True)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where a victim's root goes: in memory, as a kill loses nothing that a process wrote."""
    place = tmp_path / "memory"
    place.mkdir()
    with mounted([_MEMORY], place):
        yield place / "root"
