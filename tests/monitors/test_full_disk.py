"""A container that fills the disk on which its own folder is: its end is told and kept all the same."""

import os
from pathlib import Path

import pytest

from engine.running.outcome import outcome
from tests.filesystems import formatted
from tests.monitors.monitored import bundle_in, output, run, shell

pytestmark = pytest.mark.root

_FILL = (
    "while head -c 100000 /dev/zero >> /tmp/big; do :; done; "
    "while echo x >> /tmp/big; do :; done; "
    "i=0; while echo x > /tmp/f$i; do i=$((i+1)); done; echo full; exit 7"
)


@pytest.mark.parametrize("kind", ["btrfs", "ext4", "xfs"])
def test_an_end_on_a_full_disk(kind, tmp_path, rootfs, runtime):
    disk = tmp_path / "disk"
    disk.mkdir()
    with formatted(kind, tmp_path / "image", disk):
        filled = disk / "filled"
        filled.mkdir()
        one = bundle_in(disk, rootfs, runtime, shell(_FILL), mounts=[_bind(filled)], attached=True)
        try:
            told, found = run(one)
            assert b"full" in output(told)
            assert (found.ended, found.code) == (True, 7)
            assert outcome(one.folder) == found
            assert not (one.folder / "exit.new").exists()
            with pytest.raises(OSError, match="No space"):
                (filled / "more").write_bytes(os.urandom(1 << 20))
        finally:
            one.delete()
            assert not one.tidy()


def _bind(folder: Path) -> dict[str, object]:
    return {"destination": "/tmp", "type": "bind", "source": str(folder), "options": ["rbind", "rw"]}
