"""What a runtime says of what it cannot do: a file with a JSON object on each line.

Sync; safe from any thread. Light: the monitor imports it.
"""

import json
import os
from pathlib import Path

__all__ = ["RUNTIME_LOG", "said"]

RUNTIME_LOG = "runtime.log"
"""Its name in a container's folder, while the container is started."""

_LAST = 64 * 1024


def said(file: Path) -> str:
    """Return the last reason in a runtime's log, nothing if there is none, and remove the log."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _LAST))
            lines = opened.read(_LAST).splitlines()
        file.unlink()
    except FileNotFoundError:
        return ""
    for line in reversed(lines):
        try:
            about = json.loads(line)
        except ValueError:
            continue
        if isinstance(about, dict) and about.get("level", "error") in {"error", "fatal", "panic"}:
            return str(about.get("msg", ""))
    return ""
