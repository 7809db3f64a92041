"""A store on a nearly full disk of each kind: an error that says so, never a SIGBUS, and room left."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import plugins
from engine.errors import ResourceExhausted
from engine.root import Root
from snapshotters import probe
from tests.filesystems import formatted

pytestmark = pytest.mark.root

_OPENING = """
import json, os, shutil, sys
from contextlib import suppress
from pathlib import Path
from engine.errors import ResourceExhausted
from engine.fs.durable import flush_file_system
from engine.metadata.leases import leased
from engine.root import Root

disk = Path(sys.argv[1])
root, filling = disk / "root", disk / "filling"

def free():
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize

def fill(left):
    with filling.open("ab") as file:
        for size in (16 << 20, 1 << 20, 64 << 10, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
    os.truncate(filling, max(0, filling.stat().st_size - left))
    flush_file_system(disk)

def opened():
    try:
        with Root(root) as store, leased(store.meta, "default"):
            return True
    except ResourceExhausted:
        return False

rows = []
for left in (0, 64 << 10, 256 << 10, 1 << 20):
    for is_new in (True, False):
        filling.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        flush_file_system(disk)
        if not is_new:
            assert opened()
            (root / "reserve").unlink()
        fill(left)
        before = free()
        done = [opened() for _ in range(2)]  # the second finds what the first left
        reserve = root / "reserve"
        held = reserve.stat().st_blocks * 512 if reserve.exists() else 0
        rows.append((left, is_new, before, held, done))
print(json.dumps(rows))
"""


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_store_is_opened_on_a_disk_that_fills_up(tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk").mkdir()
    with formatted(kind, tmp_path / "image", tmp_path / "disk") as disk:
        command = [sys.executable, "-P", "-c", _OPENING, str(disk)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr or f"killed by signal {-child.returncode}"
    for left, is_new, before, held, (first, second) in json.loads(child.stdout):
        assert held <= before / 16 + 4096, (left, is_new)
        assert first <= second, "what was held back was needed"
        assert first or is_new or before < 256 << 10, (left, "there was room for a record")


def test_a_reserve_that_cannot_be_had_whole_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a quota, of which statvfs knows nothing: ext4 keeps what it had allocated until then."""

    def gets_a_part(file: int, at: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("/reserve"):
            os.ftruncate(file, size // 2)
            raise OSError(errno.EDQUOT, "quota exceeded")
        real(file, at, size)

    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", gets_a_part)
    with Root(tmp_path / "root"):
        assert not (tmp_path / "root" / "reserve").exists()
    monkeypatch.undo()
    with Root(tmp_path / "root"):
        assert (tmp_path / "root" / "reserve").stat().st_size


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_bytes_that_do_not_fit_are_an_error_and_all_else_stays(tmp_path: Path, kind: str) -> None:
    (tmp_path / "disk").mkdir()
    with formatted(kind, tmp_path / "image", tmp_path / "disk") as disk:
        command = [sys.executable, "-P", "-c", _WRITING, str(disk)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr or f"killed by signal {-child.returncode}"


_WRITING = """
import os, sys
from pathlib import Path
from engine.errors import ResourceExhausted
from engine.kv.schema import EXTENT
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.root import Root
from engine.stores import Stores

disk = Path(sys.argv[1])
with Root(disk / "root") as root:
    content = Stores(root, "default", Platform()).content
    kept, large = bytes(2 * EXTENT + 5), bytes(16 * EXTENT)
    with content.ingest("kept", lease="") as writer:
        writer.write(kept)
        writer.commit()
    found = os.statvfs(disk)
    with (disk / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - (4 << 20))
    try:
        with content.ingest("large", lease="") as writer:
            writer.write(large)
        raise SystemExit("16 MiB fit in 4")
    except ResourceExhausted:
        pass
    assert content.verify(digest_of(kept)) == len(kept)
    (disk / "filling").unlink()
    with content.ingest("large", lease="") as writer:
        writer.write(large[writer.offset:])
        writer.commit()
    assert content.verify(digest_of(large)) == len(large)
"""


def test_a_full_disk_is_not_called_a_backend_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    with Root(tmp_path / "root") as root, monkeypatch.context() as patch:
        patch.setattr(probe, "tempfile", SimpleNamespace(mkdtemp=full))
        for ask in (plugins.default_name, lambda root: plugins.check(root, "overlay")):
            with pytest.raises(ResourceExhausted, match="no space left"):
                ask(root)
        reasons = {backend.name: backend.probe.reason for backend in plugins.backends(root)}
        assert "no space left" in reasons["overlay"]
