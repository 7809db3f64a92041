"""The command: python -m tests.containers [--containers 200] [--at-once 20] [--processes 1] [--seed W].

So many containers are launched and destroyed by engines that are killed; no trace of any may be left.
"""

import argparse
import secrets
import time

from tests.conftest import pytest_configure
from tests.containers.harness import store, storm
from tests.filesystems import shared_memory


def main() -> None:
    """Run once, and say what was done."""
    parser = argparse.ArgumentParser(prog="python -m tests.containers", description=__doc__)
    parser.add_argument("--containers", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    pytest_configure()  # mounts of its own
    began = time.monotonic()
    with shared_memory() as folder, store(folder) as root:
        done = storm(
            root,
            containers=given.containers,
            at_once=given.at_once,
            processes=given.processes,
            seed=given.seed,
        )
    print(
        f"{done.destroyed} containers were destroyed, engines were killed {done.killed} times; "
        f"{done.found} times one was found again, and nothing is left ({time.monotonic() - began:.0f} s)"
    )


if __name__ == "__main__":
    main()
