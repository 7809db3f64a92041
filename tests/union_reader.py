"""A plain reader of aufs branches: what aufs would show, by its rules and without a kernel.

The rules, from aufs(5) and its design documents: the topmost branch that has a name wins; a regular
file `.wh.x` hides `x` of its own branch and of those below; `.wh..wh..opq` ends the search below its
folder; names that begin with `.wh.` never show; a folder merges with folders below it only.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from engine.testing.trees import TreeEntry, describe

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"


def read_union(branches: Sequence[Path]) -> dict[bytes, TreeEntry]:
    """Return what shows of `branches`, the topmost first."""
    found: dict[bytes, tuple[bytes, os.stat_result]] = {}
    _merge([os.fsencode(branch) for branch in branches], b"", found)
    return describe(found)


def _merge(
    folders: Sequence[bytes], at: bytes, found: dict[bytes, tuple[bytes, os.stat_result]]
) -> None:
    hidden: set[bytes] = set()
    below: dict[bytes, list[bytes]] = {}
    for folder in folders:
        names = os.listdir(folder)
        hidden |= {n[len(PREFIX) :] for n in names if n.startswith(PREFIX) and n != OPAQUE}
        for name in names:
            if name.startswith(PREFIX) or name in hidden:
                continue
            path = os.path.join(folder, name)
            info = os.lstat(path)
            relative = os.path.join(at, name)
            if relative not in found:
                found[relative] = (path, info)
                if stat.S_ISDIR(info.st_mode):
                    below[relative] = [path]
            elif relative in below and stat.S_ISDIR(info.st_mode):
                # aufs passes over a name of another type and looks further down: a layer must say
                # "opaque" where a folder stands over a file, and this reader does not forgive it.
                below[relative].append(path)
        if OPAQUE in names:
            break
    for relative, merged in below.items():
        _merge(merged, relative, found)
