"""The world outside the store that hostile layers try to reach."""

from pathlib import Path

import pytest

from tests.security.harness import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Victims beside the store, with the process in a folder that holds one of them."""
    made = World(tmp_path)
    monkeypatch.chdir(tmp_path / "cwd")
    return made
