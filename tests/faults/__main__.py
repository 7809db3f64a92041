"""The command: python -m tests.faults [--every N] [--kill] [COMMAND…]: every n-th call fails once.

A line for each fault: command, call, error, which of them, and the exit code.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path

from tests.faults.harness import COMMANDS, KILL, assert_whole, copied, run_with, template
from tests.filesystems import shared_memory

_FAULTS = {
    "pwrite64": "EIO",
    "pwritev": "EIO",
    "fdatasync": "EIO",
    "fsync": "EIO",
    "syncfs": "EIO",
    "rename": "EIO",
    "fallocate": "ENOSPC",
    "ftruncate": "EIO",
    "mkdir": "EROFS",
    "unlink": "EROFS",
    "rmdir": "EBUSY",
    "unlinkat": "EIO",
    "flock": "ENOLCK",
}


def main() -> None:
    """Go through all faults; stop at the first that does harm."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try only each N-th call")
    parser.add_argument("--kill", action="store_true", help="kill the process at the call instead")
    parser.add_argument("--call", action="append", choices=_FAULTS)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    given = parser.parse_args()
    os.umask(0o022)
    with shared_memory() as folder:
        made = template(folder / "images")
        for command, call in itertools.product(given.commands, given.call or _FAULTS):
            for number in itertools.count(1, given.every):
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    error = KILL if given.kill else _FAULTS[call]
                    root = copied(made, Path(place))
                    done = run_with(made, root, command, call, error, str(number))
                    if not done.injected:
                        break
                    print(command, call, number, done.code, *done.messages.splitlines()[-1:], flush=True)
                    assert_whole(made, root, command, done)


if __name__ == "__main__":
    main()
