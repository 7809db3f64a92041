"""Looks at as many images as asked for: `python -m tests.power --images 100000 [--seed S]`."""

import argparse
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.power.checking import Checker
from tests.power.disk import cuts
from tests.power.trace import record

_AT_ONCE = 5000  # images of one workload


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    begun, seen, wrong = time.monotonic(), 0, 0
    while seen < options.images:
        seed = f"{options.seed}.{seen // _AT_ONCE}"
        count = min(_AT_ONCE, options.images - seen)
        with TemporaryDirectory(dir="/dev/shm", prefix="lamina-power-") as folder:
            recorded = record(Path(folder), seed)
            checker = Checker(recorded, Path(folder))
            for cut in cuts(recorded, count, seed):
                try:
                    checker.check(cut)
                except Exception:  # noqa: BLE001  all are told of, whatever they are
                    wrong += 1
                    print(f"seed {seed}, image {cut.number} of {count}:")
                    traceback.print_exc()
        seen += count
        print(f"{seen} images, {wrong} of them wrong, {time.monotonic() - begun:.0f} s", flush=True)
    return bool(wrong)


sys.exit(main())
