"""MC-15: root in a container cannot take its files out of the project that its quota counts."""

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.oci.execution import Execution
from engine.provision.quota import limit, quota_of
from engine.running.bundle import Setting, make_spec, write_bundle
from engine.running.options import Bind, RunOptions
from engine.stores import host_platform
from tests.conftest import peer
from tests.filesystems import formatted

pytestmark = pytest.mark.root

_MIB = 1 << 20
_OF_THE_HOST = ("/bin", "/sbin", "/lib", "/lib64", "/usr")  # where chattr and what it needs are
# Both of its calls: -p sets the project, +d and -P flags, of which that it is inherited is one.
_ATTRIBUTES = "mkdir -m 777 mine; chattr -p 0 mine; chattr -P mine; chattr +d mine"
_LEAVING = f"{_ATTRIBUTES}; dd if=/dev/zero of=mine/x bs=64k count=99"


def _run(folder: Path, rootfs: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a container, root there and on the host, in `/own`."""
    unique = secrets.token_hex(8)
    binds = [
        Bind(source=path, target=path, readonly=True) for path in _OF_THE_HOST if Path(path).exists()
    ]
    options = RunOptions(args=["/bin/sh", "-c", script], cwd="/own", binds=binds)
    (rootfs / "own").mkdir()
    host = host_platform()
    spec = make_spec(Execution(platform=host), options, Setting(unique=unique, rootfs=rootfs, host=host))
    write_bundle(folder, spec)
    return subprocess.run(
        [peer("runc"), "--root", folder / "runtime", "run", "--bundle", folder, unique],
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_would_change_attributes_is_not_permitted(tmp_path: Path):
    (tmp_path / "rootfs").mkdir()
    done = _run(tmp_path, tmp_path / "rootfs", f"{_ATTRIBUTES}; lsattr -d mine")
    assert done.stderr.count("Operation not permitted") == 3, done.stderr
    assert done.stdout.split()[1:] == ["mine"], "reading them is"


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with project quotas."""
    make = ("-Oproject,quota", "-Equotatype=prjquota") if request.param == "ext4" else ()
    (tmp_path / "disk").mkdir()
    with formatted(request.param, tmp_path / "image", tmp_path / "disk", "prjquota", make=make) as made:
        yield made


@pytest.mark.quota
def test_mc_15_root_in_a_container_cannot_leave(tmp_path: Path, disk: Path):
    rootfs = disk / "1/rootfs"
    rootfs.mkdir(parents=True)
    limit([rootfs], 2 * _MIB)
    done = _run(tmp_path, rootfs, _LEAVING)
    assert done.returncode
    assert "No space left" in done.stderr or "quota exceeded" in done.stderr, done.stderr
    found = quota_of(rootfs)
    assert found
    assert _MIB < found.size <= 2 * _MIB
