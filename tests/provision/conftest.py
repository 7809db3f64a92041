"""The bench that tests of provisioning share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provision.scene import Bench, bench


@pytest.fixture(name="bench")
def _bench(tmp_path: Path, umask_0: None) -> Iterator[Bench]:
    with bench(tmp_path / "root") as made:
        yield made
