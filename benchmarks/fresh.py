"""A brand-new file system in memory for each timed run.

On an ext4 that was just used, creating files soon after many were deleted costs many times as much
(inodes freed in the last seconds are passed over), so a second run in one place measures the deletion
of the first. In memory, because the speed of a shared disk is not ours to measure.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_SIZE = 10 << 30


@contextmanager
def fresh_file_system() -> Iterator[Path]:
    """Mount an empty ext4 for the length of a block. Needs root, and mkfs.ext4."""
    with TemporaryDirectory(prefix="lamina-fs-", dir="/dev/shm") as holder:
        image, target = Path(holder) / "image", Path(holder) / "mnt"
        target.mkdir()
        with image.open("wb") as file:
            file.truncate(_SIZE)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", options, str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", str(target)], check=True)
