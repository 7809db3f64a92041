"""Removing what images made: bounded in time where it is asked for, folders too."""

import time
from pathlib import Path

import pytest

from engine.fs.attributes import folder_descriptor
from engine.fs.removal import Unfinished, remove_tree


@pytest.mark.parametrize("kind", ["files", "folders", "deep"])
def test_a_removal_stops_when_its_time_is_over(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(50):
        if kind == "files":
            (tree / str(number)).touch()
        elif kind == "folders":
            (tree / str(number)).mkdir()
        else:
            (tree / "d" / str(number) / "e").mkdir(parents=True)
    with folder_descriptor(tmp_path) as folder:
        with pytest.raises(Unfinished):
            remove_tree(folder, b"tree", until=time.monotonic())
        assert tree.exists()
        remove_tree(folder, b"tree")
        assert not tree.exists()
