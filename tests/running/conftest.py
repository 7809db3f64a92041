"""What tests that run containers share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running.scene import Scene, scene


@pytest.fixture(name="scene")
def _scene(tmp_path: Path, umask_0: None) -> Iterator[Scene]:
    """A place for a store, with an image of busybox; nothing of any container may be left in the end."""
    with scene(tmp_path) as made:
        yield made


@pytest.fixture(name="each", params=["overlay", "copy"])
def _each(tmp_path: Path, umask_0: None, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The same, on each backend that mounts here."""
    with scene(tmp_path, request.param) as made:
        yield made
