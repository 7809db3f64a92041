"""Fixtures that many tests share, and the check that a test leaves nothing behind."""

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from engine.mount import deactivate
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores

AMD64 = Platform(os="linux", architecture="amd64")
_HEARD = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)

_CLONE_NEWNS = 0x20000
_PRIVATE = 0x4000 | 1 << 18  # MS_REC | MS_PRIVATE

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure() -> None:
    """Give the tests mounts of their own.

    Other tests that run at once, in a mount namespace with copies of what is mounted here, would
    keep it in use; and of tests that are killed nothing stays mounted.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _PRIVATE, None)
        assert not failed, os.strerror(ctypes.get_errno())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root, skip what needs it; in CI nothing may be skipped (`.ci/run` counts)."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root; run `sudo make test` for everything")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)


def _mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n")
    points = [os.fsdecode(line.split(b" ")[4]).replace("\\040", " ") for line in lines]
    return [point for point in points if point.startswith(f"{folder}/")]


def children() -> set[int]:
    """Return the process IDs of this process's children, the dead but unreaped among them.

    Only those that run Python: registries of other tests are children, too.
    """
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text(encoding="utf-8", errors="replace").partition(" (")
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, _, about = rest.rpartition(") ")
        if name.startswith("python") and int(about.split()[1]) == os.getpid():
            found.add(int(pid))
    return found


@pytest.fixture
def all_in_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the bytes of small blobs where those of large ones are, so that a test need not be large."""
    for module in ("ingests", "writer"):
        monkeypatch.setattr(f"engine.content.{module}.INLINE", -1)


@pytest.fixture(scope="session", autouse=True)
def _signals() -> Iterator[None]:
    """Take back what `nohup` or a script's `&` ignore: commands that are started here inherit it."""
    ignored = [number for number in _HEARD if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        how = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, how)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a mount or a process behind, after tidying up for it."""
    before = children()
    mask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(mask)
    mounts = _mounts_below(tmp_path)
    for point in reversed(mounts):
        deactivate(Path(point), lazy=True)
    running = children() - before
    assert not mounts, f"left mounted: {mounts}"
    assert not running, f"left running: {running}"


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    """Stores on a fresh root, for an amd64 host whatever this one is."""
    with Root(tmp_path / "root") as root:
        assert root.owners.me  # opens its file: later it would look like a descriptor left open
        opened = Stores(root, "default", AMD64)
        yield opened
        opened.close()


@pytest.fixture
def umask_0() -> Iterator[None]:
    """The umask of a worker, for tests that apply layers in their own process."""
    before = os.umask(0)
    yield
    os.umask(before)


def peer(name: str) -> str:
    """Return the path of a real peer's program; skip without it, but fail in CI."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing, and CI must have it")
        pytest.skip(f"{name} is not installed")
    return found


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failure: a peer or a right is missing there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not reporter:
        return  # one of several that share the tests: the one above them counts
    if os.environ.get("CI") and exitstatus == 0 and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
