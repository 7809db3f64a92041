"""Bundles that real runtimes run, and the check that nothing of a container is left."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import NotSupported
from engine.running.runc import Runtime, find_runtime
from tests.conftest import peer
from tests.monitors.monitored import Bundle, bundle_in

COMMANDS = "pwd tail tr sh true false cat echo printf sleep stty tty head dd id kill yes seq setsid"


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with busybox in it; containers only read it."""
    folder = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (folder / name).mkdir()
    shutil.copy(peer("busybox"), folder / "bin" / "busybox")
    for name in COMMANDS.split():
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "etc" / "text").write_text("no program\n")
    (folder / "etc" / "passwd").write_text("five:x:5:6::/home:\n")
    (folder / "etc" / "group").write_text("seven:x:7:five\neight:x:8:five\n")
    return folder


def _working() -> Iterator[str]:
    for name in ("crun", "runc"):
        try:
            yield find_runtime(name).name
        except NotSupported:
            continue


@pytest.fixture(params=list(_working()) or ["runc"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Each runtime that works here."""
    return find_runtime(request.param)


@pytest.fixture
def bundle(tmp_path: Path, rootfs: Path, runtime: Runtime) -> Iterator[Callable[..., Bundle]]:
    """Make folders of containers; fail a test that leaves a process, a cgroup or a descriptor behind."""
    made: list[Bundle] = []
    files = len(os.listdir("/proc/self/fd"))

    def make(*args: str, **more: object) -> Bundle:
        made.append(bundle_in(tmp_path, rootfs, runtime, args, **more))
        return made[-1]

    yield make
    left = [what for what in [one.tidy() for one in made] if what]
    assert not left
    assert len(os.listdir("/proc/self/fd")) == files
