"""What resists removal does not keep the rest, and is told."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.fs.removal import remove_tree
from engine.mount import Mount, mounted

pytestmark = pytest.mark.root


def _remove(folder: Path) -> None:
    parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(parent, os.fsencode(folder.name))
    finally:
        os.close(parent)


def _tree(top: Path) -> Path:
    for name in ("a/b/c/d", "a/b2", "z"):
        (top / name).mkdir(parents=True)
        (top / name / "file").touch()
    return top


@pytest.mark.parametrize("where", ["a/b/c/file", "a/b/c", "file"])
def test_the_rest_goes_and_the_first_reason_is_told(tmp_path: Path, where: str):
    top = _tree(tmp_path / "top")
    place = top / where
    if not place.exists():
        place.touch()
    subprocess.run(["chattr", "+i", place], check=True)
    try:
        with pytest.raises(PermissionError):
            _remove(top)
        left = [path for path in top.rglob("*") if path.is_file()]
        assert {path.name for path in left} <= {"file"}
        assert len(left) <= 1
    finally:
        for path in [*top.rglob("*")]:
            subprocess.run(["chattr", "-i", path], check=False, capture_output=True)
    _remove(top)
    assert not top.exists()


def test_several_may_remove_one_tree(tmp_path: Path):
    top = tmp_path / "top"
    for number in range(300):
        (top / f"{number}" / "a" / "b").mkdir(parents=True)
        (top / f"{number}" / "a" / "file").touch()
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(_remove, top) for _ in range(4)]
        failures = [result.exception() for result in results if result.exception()]
    # Whoever looks last finds it empty: others may at most see what is moved meanwhile.
    assert not top.exists()
    assert len(failures) < 4


def test_a_mount_is_never_emptied(tmp_path: Path):
    top, precious = _tree(tmp_path / "top"), tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").touch()
    bind = Mount(type="bind", source=str(precious), options=["bind"])
    with mounted([bind], top / "a" / "b"):
        with pytest.raises(OSError, match="busy"):
            _remove(top)
        assert not (top / "z").exists()
    assert (precious / "kept").exists()
