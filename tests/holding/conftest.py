"""The scene that tests of who holds what share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.holding.scene import Scene, scene


@pytest.fixture(name="scene")
def _scene(tmp_path: Path, umask_0: None) -> Iterator[Scene]:
    with scene(tmp_path / "root") as made:
        yield made
