"""A plain reader of aufs branches: what aufs would show, by its rules and without a kernel.

The rules, from aufs(5), its design documents and a real kernel (6.1): the topmost branch that has a
name wins; a regular file `.wh.x` hides `x` of its own branch and of those below; `.wh..wh..opq` ends
the search below its folder, *and of several in one folder the lowest counts*, so that what an upper
one should hide shows again; names that begin with `.wh.` never show; a folder merges with folders
below it, also below what is no folder.
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
    listings = [os.listdir(folder) for folder in folders]
    marked = [number for number, names in enumerate(listings) if OPAQUE in names]
    last = marked[-1] if marked else len(folders)
    for folder, names in list(zip(folders, listings, strict=True))[: last + 1]:
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
                # aufs passes over a name of another type and looks further down: a layer must hide
                # what is there, and this reader does not forgive it.
                below[relative].append(path)
    for relative, merged in below.items():
        _merge(merged, relative, found)
