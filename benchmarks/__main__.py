"""`python -m benchmarks COMMAND`: measurements of lamina, beside other tools and its own targets."""

import argparse
import os
import signal
import sys
from importlib import import_module

from benchmarks.fresh import own_mounts, sweep

COMMANDS = {
    "unpack": "images to root file systems, beside other tools and the machine's limits",
    "sharing": "ten images on one base, and ten unpacks of one image at once",
    "pull": "images from a registry, beside containerd",
    "containers": "containers made, run and removed, beside runc and podman",
    "store": "what a store of a million blobs costs",
    "ingest": "blobs into a store and out of it, beside plain files",
    "hostile": "images that are meant to cost much",
    "corpus": "make an image that the others measure",
    "render": "tables and pictures of what `unpack --json` wrote",
}


def main() -> int:
    """Run the command that was asked for; return its exit code."""
    lines = "\n".join(f"  {name:11}{about}" for name, about in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n\n{lines}\n\n`python -m benchmarks COMMAND --help` says more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(sys.argv[1:2]).command
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing is left
    if os.geteuid() == 0:
        own_mounts()
    try:
        code: int = import_module(f"benchmarks.{command}").main(sys.argv[2:])
    except KeyboardInterrupt:
        return 130
    finally:
        sweep()
    return code


if __name__ == "__main__":
    sys.exit(main())
