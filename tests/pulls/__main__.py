"""The command: python -m tests.pulls [--moments 100] [--seed WORD]: a pull is killed so often.

A line for each moment, and whether it came before the end of the pull.
"""

import argparse
import os
import secrets
import tempfile
from pathlib import Path

from tests.filesystems import shared_memory
from tests.pulls.harness import assert_gone_on_with, killed, moments, pullable


def main() -> None:
    """Go through all moments; stop at the first that does harm."""
    parser = argparse.ArgumentParser(prog="python -m tests.pulls", description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    given = parser.parse_args()
    os.umask(0o022)
    print(f"seed {given.seed}", flush=True)
    with shared_memory() as folder, pullable(folder) as image:
        for moment in moments(given.seed, given.moments):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                root = Path(place) / "root"
                print(moment, "killed" if killed(image, root, moment) else "ended", flush=True)
                assert_gone_on_with(image, root, moment)


if __name__ == "__main__":
    main()
