"""What a container's folder tells of its process."""

import gc
import os

import pytest
import trio

from engine.fs.locks import lock_byte
from engine.mount import Mount, mounted
from engine.running.attaching import ended
from engine.running.outcome import outcome


@pytest.mark.root
def test_a_store_that_cannot_be_written_tells_what_runs(tmp_path):
    """As of a disk that the kernel has made read-only: the monitor, which was there before, goes on."""
    folder, seen = tmp_path / "folder", tmp_path / "seen"
    folder.mkdir()
    seen.mkdir()
    file = os.open(folder / "monitor", os.O_RDWR | os.O_CREAT, 0o600)
    lock_byte(file, 0, alone=True)
    with mounted([Mount(type="bind", source=str(folder), options=["rbind", "ro"])], seen):
        assert outcome(seen).monitored
        os.close(file)
        assert not outcome(seen).monitored


def test_of_what_is_removed_nothing_stays_open(tmp_path):
    async def main():
        assert not (await ended(tmp_path / "gone")).ended

    trio.run(main)
    gc.collect()  # a socket that nobody closed is an error here
