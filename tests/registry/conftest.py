"""Fixtures of the tests with real registries: one of each kind for all of them, and an image."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.testing.archives import archive, layout, member
from tests.registry.servers import Certified, Server, certificates, passwords, serving


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certificates(tmp_path_factory.mktemp("certified"))


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory, certified: Certified) -> Iterator[Server]:
    """TLS of a private CA, and passwords."""
    folder = tmp_path_factory.mktemp("secure")
    with serving(folder, passwords(folder), certified=certified) as server:
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    base = archive(
        member("etc/", "5"), member("etc/name", data=b"lower\n"), member("etc/gone", data=b"x")
    )
    above = archive(member("etc/name", data=b"upper\n"), member("etc/.wh.gone"))
    return layout(tmp_path / "source", [base, above])
