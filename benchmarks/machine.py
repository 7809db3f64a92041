"""The machine and the tools of a run."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version as distribution
from pathlib import Path

from benchmarks.cores import CORES
from benchmarks.peers import SYNC, version

__all__ = ["about"]


def about(peers: Sequence[str]) -> dict[str, str]:
    """Return what figures depend on, by name."""
    names = dict.fromkeys(peer.removesuffix(SYNC) for peer in peers)
    return {
        "cores": str(CORES),
        "processor": _processor(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "lamina": distribution("lamina"),
        **{name: version(name) for name in names},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
