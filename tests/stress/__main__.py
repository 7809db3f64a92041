"""The command: python -m tests.stress --seconds 120 --processes 8 [--seed WORD]."""

import argparse
import secrets

from tests.filesystems import shared_memory
from tests.stress.running import stress


def main() -> None:
    """Run once, and say what was done."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with shared_memory() as folder:
        found = stress(folder, seconds=given.seconds, processes=given.processes, seed=given.seed)
    done = ", ".join(f"{count} {operation}" for operation, count in found.done.most_common())
    print(f"{found.done.total()} operations ({done}); {found.killed} processes were killed")


if __name__ == "__main__":
    main()
