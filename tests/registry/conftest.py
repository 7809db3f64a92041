"""Fixtures of the tests with registries: a fake one for each, real ones for all, and an image."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.testing.archives import archive, layout, member
from engine.testing.fake_registry import FakeRegistry
from tests.compat.containerd import Containerd, running
from tests.compat.images import run
from tests.conftest import peer
from tests.filesystems import shared_memory
from tests.registry.asking import Served
from tests.registry.pulls import BIG, HELLO, Held
from tests.registry.servers import Certified, Server, certificates, passwords, serving


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().running() as running:
        yield running


@pytest.fixture
def served(registry: FakeRegistry) -> Served:
    """An image of two layers, one small, one of several extents."""
    return Served(registry, (HELLO, BIG))


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.go_on.set()


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


@pytest.fixture
def storage() -> Iterator[Callable[..., str]]:
    """Run podman or buildah with storage of its own, in a short path: podman wants no long ones."""
    with shared_memory() as top:
        policy, registries = top / "policy.json", top / "registries.conf"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        registries.write_text("")
        (top / "containers.conf").write_text('[engine]\nlock_type = "file"\n')  # else in /dev/shm
        places = ("--storage-driver", "vfs", "--root", top / "storage", "--runroot", top / "run")
        more = {"TMPDIR": str(top), "HOME": str(top), "CONTAINERS_REGISTRIES_CONF": str(registries)}
        more["CONTAINERS_CONF"] = str(top / "containers.conf")

        def call(program: str, command: str, *words: object) -> str:
            rules = ("--signature-policy", policy)
            own = ("--tmpdir", top / "tmp") if program == "podman" else ()
            return run(peer(program), *places, *own, command, *rules, *words, env={**os.environ, **more})

        yield call


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    top = tmp_path_factory.mktemp("containerd")
    with running(top / "place") as started:
        yield started
    shutil.rmtree(top)
